"""Several seeds or folds of one data set as mean and standard deviation.

    python scripts/summarize.py runs/poverty_A runs/poverty_B runs/poverty_C runs/poverty_D runs/poverty_E

Reads the last result of each method in each run folder's results.jsonl. The metrics are those that the data set reports; the
standard deviation is that of a sample (n - 1), as on the WILDS leaderboard.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from dmoe.errors import UserError
from dmoe.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--split", default="target")
    options = parser.parse_args()
    print(table([RunFolder(folder).last_results(options.split) for folder in options.run_dirs]))


def table(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """A row a method that all runs have, a column a reported metric: mean and standard deviation over the runs.

    Raises:
        UserError: the runs are of different data sets, are the same replicate, or have no method in common.
    """
    first = next(iter(runs[0].values()))
    for run in runs:
        row = next(iter(run.values()))
        if row["dataset"] != first["dataset"]:
            raise UserError(f"runs of {first['dataset']} and of {row['dataset']} have no mean in common")
    replicates = [next(iter(run.values()))["replicate"] for run in runs]
    if len(set(replicates)) < len(replicates):
        raise UserError(f"the same replicate twice, {', '.join(replicates)}: each run has to have its own seed or fold")
    methods = [method for method in runs[0] if all(method in run for run in runs)]
    if not methods:
        raise UserError("the runs have no method in common")
    names = {**first["reported"], "mean": "mean of domains", "worst": "worst domain"}
    lines = [f"| {first['dataset']}, {first['split']} | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    for method in methods:
        cells = []
        for key in names:
            values = [run[method][key] if key in ("mean", "worst") else run[method]["overall"][key] for run in runs]
            cells.append(spread(values, percent=first["unit"] == "fraction"))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Mean ± standard deviation over {len(runs)} runs ({', '.join(replicates)})."])


def spread(values: Sequence[float | None], *, percent: bool) -> str:
    known = [100 * value if percent else value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    digits = 1 if percent else 3
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
