"""A page about a finished run or comparison, and the README's tables, from the rows of ``results.jsonl``. Nothing here needs torch
but what gathers evidence: ``evidence.py``, ``selection_evidence.py`` and ``pictures.py``."""
