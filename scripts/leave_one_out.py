"""Each domain of a folder of pictures left out in turn, trained on the others, tested on it: the usual table of PACS and its like.

    python scripts/leave_one_out.py --data_dir PACS --out runs/pacs
    python scripts/leave_one_out.py --data_dir PACS --out runs/pacs --seeds 1 2 3 --config configs/mine.yaml meta.inner_lr=0.01

Each pair of a domain and a seed is a run of its own in OUT/DOMAIN/seed_N, one after the other. What is finished is not trained
again, only tested. Choices are made on source images that are held out, never on the domain that is left out.
Exit status: 0 all runs ended well, 1 some did not and their cells are empty, 2 nothing could be started.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.command_line import run_main
from dmoe.errors import UserError

RUN = Path(__file__).resolve().parent.parent / "run.py"

NOT_IN_PERCENT = ("r", "mse")
EMPTY = "-"

Row = Mapping[str, Any]
"""A line of results.jsonl."""


@dataclass(frozen=True)
class Cell:
    """One run: the domain that is left out, and the seed."""

    domain: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it lies; names that cannot be a folder's are written with % signs."""
        name = self.domain.replace("%", "%25").replace("/", "%2F")
        return out / (f"%2E{name[1:]}" if name.startswith(".") else name) / f"seed_{self.seed}"

    def __str__(self) -> str:
        return f"{self.domain}, seed {self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="DIR/domain/class/image, or a CSV file")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="where the runs are written")
    parser.add_argument("--config", type=Path, metavar="FILE", help="another YAML file than configs/folders.yaml")
    parser.add_argument("--seeds", nargs="+", default=["1"], metavar="S", help="default: 1")
    parser.add_argument("--gpu", type=int, metavar="G", help="as in run.py")
    parser.add_argument("--threads", type=int, metavar="T", help="as in run.py")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="configuration fields")
    options = parser.parse_intermixed_args()
    options.overrides += [word for word in options.seeds if "=" in word]  # where they come right behind the seeds
    seeds = seeds_of([word for word in options.seeds if "=" not in word])
    cells = [Cell(domain, seed) for domain in domains_of(options.data_dir) for seed in seeds]

    failed: dict[Cell, str] = {}
    results: dict[Cell, dict[str, Row]] = {}
    for number, cell in enumerate(cells, start=1):
        print(f"\n== left out: {cell} ({number} of {len(cells)}), in {cell.folder(options.out)}", flush=True)
        status = subprocess.run(command(cell, options), check=False).returncode
        try:
            if status:
                raise UserError(f"exit status {status}")
            results[cell] = read_results(cell.folder(options.out))
        except UserError as error:
            failed[cell] = str(error)
            print(f"== left out: {cell}: failed: {error}", file=sys.stderr, flush=True)
    print(tables(results, domains=list(dict.fromkeys(cell.domain for cell in cells))))
    for cell, why in failed.items():
        print(f"failed: {cell}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def seeds_of(words: Sequence[str]) -> list[int]:
    """The seeds, each once.

    Raises:
        UserError: one is no number.
    """
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise UserError(f"--seeds: must be whole numbers, got {word!r}")
    return list(dict.fromkeys(map(int, words)))


def domains_of(source: Path) -> list[str]:
    """The domains to leave out.

    Raises:
        UserError: there are fewer than two, or a CSV file has splits of its own.
    """
    from dmoe.data.folders import read_listing

    listing = read_listing(source)
    if listing.splits:
        raise UserError(f"{source}: its column split says what is tested on; drop the column to leave out each domain in turn")
    if len(listing.domain_names) < 2:
        raise UserError(f"{source}: holds one domain, {listing.domain_names[0]}: none is left to learn from")
    return listing.domain_names


def command(cell: Cell, options: argparse.Namespace) -> list[str]:
    """What runs one cell."""
    flags = {"--config": options.config, "--gpu": options.gpu, "--threads": options.threads}
    return [
        *(sys.executable, str(RUN), "--dataset", "folders", "--data_dir", str(options.data_dir)),
        *("--run_dir", str(cell.folder(options.out)), "--seed", str(cell.seed)),
        *(word for flag, value in flags.items() if value is not None for word in (flag, str(value))),
        *options.overrides,
        f"data.target_domains={json.dumps([cell.domain], ensure_ascii=False)}",
    ]


def read_results(folder: Path) -> dict[str, Row]:
    """The last result of each method on the target split.

    Raises:
        UserError: there are none, or a line is damaged.
    """
    path = folder / "results.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["split"] == "target":
                found[row["method"]] = row
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number}: damaged: delete that line") from None
    if not found:
        raise UserError(f"{path}: holds no result on the target split")
    return found


def tables(results: Mapping[Cell, Mapping[str, Row]], *, domains: Sequence[str]) -> str:
    """One table in markdown for each metric that the runs report."""
    reported: dict[str, str] = {}
    for rows in results.values():
        for row in rows.values():
            reported |= row.get("reported") or {row["metric"]: row["metric"]}
    return "\n".join(table(results, domains=domains, metric=metric, title=title) for metric, title in reported.items())


def table(results: Mapping[Cell, Mapping[str, Row]], *, domains: Sequence[str], metric: str, title: str) -> str:
    """Rows are methods, columns the domains that were left out: mean and standard deviation over seeds.

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
    lines.append(
        f"\nMean ± standard deviation over seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"\nSeed {seeds[0]}."
    )
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return EMPTY
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    run_main(main)
