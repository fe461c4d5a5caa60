"""Each domain of pictures in folders left out in turn, trained on the others and tested on it, for several seeds.

The protocol of Gulrajani & Lopez-Paz, *In search of lost domain generalization*, ICLR 2021 (DomainBed), with "training-domain
validation": of the images of each other domain a fifth, drawn at random by the seed, is what checkpoints are chosen on. Here all
images of the domain that is left out are tested; the public code tests on four fifths of them.

A folder holds a run folder ``DOMAIN/seed_N`` for each domain and seed, ``logs``, and ``results.jsonl``.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.artifacts import write_json_lines
from dmoe.compare.tasks import Task, run_tasks
from dmoe.config import Config
from dmoe.console import say
from dmoe.data.folders import read_listing
from dmoe.data.registry import DEFAULT_FOLDER
from dmoe.errors import UserError
from dmoe.run_folder import RunFolder

RESULTS = "results.jsonl"
HELD_OUT = 0.2
"""Of the images of each domain to learn from, unless the command line has another ``data.validation_fraction``."""

NOT_IN_PERCENT = ("r", "mse")
EMPTY = "-"

Row = dict[str, Any]
"""A line of results.jsonl."""


@dataclass(frozen=True)
class Cell:
    """One run: the domain that is left out, and the seed."""

    domain: str
    seed: int

    @property
    def place(self) -> str:
        """The domain as the name of a folder; what cannot be one's is written with % signs."""
        name = self.domain.replace("%", "%25").replace("/", "%2F")
        return f"%2E{name[1:]}" if name.startswith(".") else name

    def folder(self, out: Path) -> Path:
        return out / self.place / f"seed_{self.seed}"


def leave_out(
    out: Path, config: Config, seeds: Sequence[int], *, run: Sequence[str], overrides: Sequence[str], at_once: int
) -> None:
    """Make the runs that are not finished yet, test all, and print the table.

    Args:
        out: where everything is written.
        config: of all runs, but for seed and domain. Of its ``data.target_domains`` each is left out; where there are none, each
            domain is.
        run: arguments of the interpreter that make a run, but for folder, seed and overrides.
        overrides: of configuration fields.
        at_once: processes.

    Raises:
        UserError: the data set has no domains to leave out, or some of the runs failed; what is finished is in ``results.jsonl``
            all the same.
    """
    if config.dataset != "folders":
        raise UserError(f"--protocol: domainbed leaves out domains of --dataset folders, this is {config.dataset}")
    domains = domains_of(config.data.dir or DEFAULT_FOLDER, config.data.target_domains)
    cells = [Cell(domain, seed) for domain in domains for seed in seeds]
    tasks = {f"{cell.place}_seed_{cell.seed}": Task(command(cell, out, run=run, overrides=overrides)) for cell in cells}
    try:
        run_tasks(tasks, at_once=at_once, logs=out / "logs", name="domainbed")
    finally:
        results = write_results(out, cells)
        if results:
            say(tables(results, domains=domains))


def domains_of(source: Path, chosen: Sequence[str] = ()) -> list[str]:
    """The domains to leave out, all unless some are chosen.

    Raises:
        UserError: there are fewer than two, one has no images or is unknown, or a CSV file has splits of its own.
    """
    listing = read_listing(source)
    known = listing.domain_names
    if listing.splits:
        raise UserError(f"{source}: its column split says what is tested on; drop the column to leave out each domain in turn")
    if source.is_dir():
        folders = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
        empty = [name for name in folders if name not in known]
        if empty:
            raise UserError(f"{source / empty[0]}: a domain without images: add some, or take the folder away")
    if len(known) < 2:
        raise UserError(f"{source}: holds one domain, {known[0]}: none is left to learn from")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"data.target_domains: {unknown[0]!r} is no domain of {source}; it holds {', '.join(known[:12])}")
    return list(chosen) or known


def command(cell: Cell, out: Path, *, run: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Arguments of the interpreter that make one run."""
    return [
        *(*run, "--run_dir", str(cell.folder(out)), "--seed", str(cell.seed)),
        *("data.validation_domains=[]", f"data.validation_fraction={HELD_OUT}", *overrides),
        *(f"data.target_domains={json.dumps([cell.domain], ensure_ascii=False)}", f"data.seed={cell.seed}"),
    ]


def write_results(out: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Row]]:
    """``results.jsonl``: what each run found last, with the domain that it left out. What is not finished is left away."""
    results = {cell: RunFolder(cell.folder(out)).last_results("target") for cell in cells if (cell.folder(out) / RESULTS).is_file()}
    rows = [{"protocol": "domainbed", "left_out": cell.domain, **row} for cell, found in results.items() for row in found.values()]
    if rows:
        write_json_lines(out / RESULTS, rows)
        say(f"{len(rows):,} results: {out / RESULTS}")
    return results


def tables(results: Mapping[Cell, Mapping[str, Row]], *, domains: Sequence[str]) -> str:
    """One table in markdown for each metric that the runs report."""
    reported: dict[str, str] = {}
    for rows in results.values():
        for row in rows.values():
            reported |= row.get("reported") or {row["metric"]: row["metric"]}
    return "\n".join(table(results, domains=domains, metric=metric, title=title) for metric, title in reported.items())


def table(results: Mapping[Cell, Mapping[str, Row]], *, domains: Sequence[str], metric: str, title: str) -> str:
    """Rows are methods, columns the domains that were left out: mean and standard error over seeds.

    The mean over domains is taken of the seeds for which no domain is missing.
    """
    scale, digits = (1, 3) if metric in NOT_IN_PERCENT else (100, 1)
    heading = title if metric in NOT_IN_PERCENT else f"{title} in percent"
    lines = [f"\n| {' | '.join([heading, *domains, 'mean'])} |", "|---" * (len(domains) + 2) + "|"]
    seeds = sorted({cell.seed for cell in results})
    for method in dict.fromkeys(method for rows in results.values() for method in rows):
        values = {cell: rows[method]["overall"].get(metric) for cell, rows in results.items() if method in rows}
        known = {cell: scale * value for cell, value in values.items() if value is not None and math.isfinite(value)}
        columns = [[known[Cell(d, s)] for s in seeds if Cell(d, s) in known] for d in domains]
        whole = [s for s in seeds if all(Cell(d, s) in known for d in domains)]
        columns.append([statistics.mean(known[Cell(d, s)] for d in domains) for s in whole])
        lines.append(f"| {' | '.join([method, *(_cell(column, digits) for column in columns)])} |")
    lines.append(f"\nMean ± standard error over seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"\nSeed {seeds[0]}.")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return EMPTY
    spread = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
