"""What is tried of each objective but ERM: its paper, and settings around the published ones, the usual ones first.

"DomainBed" is Gulrajani & Lopez-Paz, ICLR 2021, with its public code: a default, and the range of its random search.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Tried = tuple[str, Sequence[Mapping[str, Any]]]

OBJECTIVES: Mapping[str, Tried] = {
    "coral": (
        "Sun & Saenko, ECCV 2016",
        # DomainBed: 1, or 0.1 to 10
        [{"penalty": p, "domains": d} for p, d in ((1.0, 4), (0.1, 4), (10.0, 4), (0.01, 4), (0.1, 8), (1.0, 8))],
    ),
    "irm": (
        "Arjovsky et al., 2019",
        # DomainBed: 100 after 0.1 of the steps, or 0.1 to 100,000
        [
            {"penalty": p, "annealed": a, "domains": 4}
            for p, a in ((100, 0.1), (1, 0.15), (0.1, 0.15), (10, 0.5), (100, 0.8), (1, 0.5))
        ],
    ),
    "mmd": (
        "Li et al., CVPR 2018",
        # DomainBed: 1, or 0.1 to 10
        [{"penalty": p, "domains": d} for p, d in ((1.0, 4), (0.1, 4), (10.0, 4), (0.3, 4), (0.1, 8), (1.0, 8))],
    ),
    "dann": (
        "Ganin et al., JMLR 2016",
        # DomainBed: 1 from the start, or 0.01 to 100; the paper: rising to 1 all the time
        [
            {"penalty": p, "ramp": r, "domains": 4}
            for p, r in ((1.0, 0.0), (1.0, 1.0), (0.1, 0.0), (0.1, 1.0), (0.01, 0.0), (10.0, 1.0))
        ],
    ),
    "fish": (
        "Shi et al., ICLR 2022",
        # ours: inner steps are of plain descent, for which nothing is published
        [{"inner_lr": lr, "domains": d} for lr, d in ((1e-2, 4), (1e-3, 4), (3e-3, 4), (3e-2, 4), (1e-1, 4), (1e-2, 8))],
    ),
    "fishr": (
        "Rame et al., ICML 2022",
        # DomainBed: 1,000 after 0.3 of the steps with 0.95, or 10 to 10,000 after 0 to 1 of them with 0.9 to 0.99
        [
            {"penalty": p, "annealed": a, "ema": ema, "domains": 4}
            for p, a, ema in (
                (1000, 0.3, 0.95),
                (100, 0.3, 0.95),
                (10, 0.3, 0.95),
                (10_000, 0.3, 0.95),
                (1000, 0.0, 0.95),
                (1000, 0.3, 0.99),
            )
        ],
    ),
    "group_dro": (
        "Sagawa et al., ICLR 2020",
        # the paper and DomainBed: 0.01; DomainBed: or 0.001 to 0.1
        [{"weights_lr": lr, "domains": d} for lr, d in ((1e-2, 4), (1e-3, 4), (3e-3, 4), (3e-2, 4), (1e-1, 4), (1e-2, 8))],
    ),
    "miro": (
        "Cha et al., ECCV 2022",
        # the paper: 0.1, or 0.001 to 1
        [
            *({"penalty": p} for p in (0.1, 0.01, 1.0, 0.001)),
            *({"penalty": p, "lr": 1e-3} for p in (0.1, 0.01)),
        ],
    ),
    "swad": (
        "Cha et al., NeurIPS 2021",
        # the paper: 3, 6 and 1.3, or 1.2
        [
            {"start_patience": start, "end_patience": end, "tolerance": tolerance}
            for start, end, tolerance in ((3, 6, 1.3), (3, 6, 1.2), (3, 3, 1.3), (3, 6, 1.5), (5, 6, 1.3), (2, 6, 1.3))
        ],
    ),
}
"""By the names of the configuration, in the order of the table."""
