"""All methods on several seeds, by several processes; and what they found, in one file.

A comparison folder holds a run folder ``seed_N`` for each seed, ``logs``, ``results.jsonl``, and in ``evidence.json`` what the
report shows beside numbers.
"""

from collections.abc import Sequence
from pathlib import Path

from dmoe.artifacts import write_json_lines
from dmoe.compare.candidates import CANDIDATES, GROUPS, Candidate
from dmoe.compare.tasks import Task, run_tasks
from dmoe.compare.work import order_of, read_rows
from dmoe.console import say
from dmoe.errors import UserError
from dmoe.run_folder import RunFolder

RESULTS = "results.jsonl"


def compare(
    folder: Path,
    seeds: Sequence[int],
    *,
    run: Sequence[str],
    flags: Sequence[str],
    at_once: int,
    methods: Sequence[str] = (),
    chosen_by: Path | None = None,
) -> None:
    """Make what is not finished yet: a run a seed, then every method on it.

    Args:
        folder: of the comparison.
        run: arguments of the interpreter that make a whole run, but for seed and folder.
        flags: of the command line that every process is given.
        at_once: processes.
        methods: by their short names or those of groups; none: the usual ones.
        chosen_by: ``results.jsonl`` of an earlier comparison, which tried settings already; None: the first seed tries them.

    Raises:
        UserError: there is no such method, methods that adapt the ERM student go without it, or some of it failed; what is
            finished is in ``results.jsonl`` all the same.
    """
    chosen = candidates_of(methods)
    tasks = {name_of(seed): Task([*run, *flags, "--seed", str(seed), "--run_dir", str(folder / name_of(seed))]) for seed in seeds}
    for seed in seeds:
        place = folder / name_of(seed)
        # What trains first: it takes longest, and a process that has nothing else to do should not wait for it at the end.
        for key, candidate in sorted(chosen.items(), key=lambda one: one[1].adapts_erm):
            needs = [name_of(seed)]
            needs += [f"{name_of(seed)}_erm"] if candidate.adapts_erm else []
            needs += [f"{name_of(seeds[0])}_{key}"] if chosen_by is None and seed != seeds[0] else []
            words = ["--run_dir", str(place), "--method", key, "--chosen_by", str(chosen_by or folder / name_of(seeds[0]))]
            tasks[f"{name_of(seed)}_{key}"] = Task(["-m", "dmoe.compare", *words, *flags], needs)
    evidence = ["--run_dir", str(folder / name_of(seeds[0])), "--evidence", str(folder / "evidence.json")]
    tasks["evidence"] = Task(["-m", "dmoe.compare", *evidence, *flags], [name_of(seeds[0])])
    try:
        run_tasks(tasks, at_once=at_once, logs=folder / "logs", name="comparison")
    finally:
        write_results(folder, seeds)


def candidates_of(names: Sequence[str]) -> dict[str, Candidate]:
    """Methods by short names, or those of groups, in the order of the table; the usual ones, where none are named."""
    unknown = [name for name in names if name not in CANDIDATES and name not in GROUPS]
    if unknown:
        raise UserError(f"compare.methods: {unknown[0]!r} is unknown; use some of {', '.join((*CANDIDATES, *GROUPS))}")
    named = {key for name in names or ["usual"] for key in GROUPS.get(name, (name,))}
    chosen = {key: candidate for key, candidate in CANDIDATES.items() if key in named}
    lost = [key for key, candidate in chosen.items() if candidate.adapts_erm and "erm" not in chosen]
    if lost:
        raise UserError(f"compare.methods: {lost[0]} adapts the ERM student that the method erm trains: name erm too")
    return chosen


def name_of(seed: int) -> str:
    return f"seed_{seed}"


def write_results(folder: Path, seeds: Sequence[int]) -> None:
    """``results.jsonl``: the rows of all methods that are finished, in the order of methods and seeds."""
    stages = [RunFolder(folder / name_of(seed)).stage(f"compare/{key}", {}) for seed in seeds for key in CANDIDATES]
    rows = order_of([row for stage in stages if stage.manifest.is_file() for row in read_rows(stage.folder)])
    if not rows:
        return
    write_json_lines(folder / RESULTS, rows)
    say(f"{len(rows):,} results: {folder / RESULTS}")
