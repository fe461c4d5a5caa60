"""Rows in a file, and the tables of a page that are made of them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmoe.artifacts import written_whole
from dmoe.errors import UserError
from scripts.benchmarks.measuring import spread

Row = Mapping[str, Any]
PLACE = re.compile(r"(<!-- (?P<kind>\w+): (?P<names>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where something is put: ``<!-- rows: meta_96 latency -->`` up to ``<!-- end -->``, a table of the rows of these names."""


def read_rows(path: Path) -> list[Row]:
    """The rows that an earlier visit wrote.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as rows: {' '.join(str(error).split())}: delete it to measure anew") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"name", "ours", "machine"} <= row.keys() for row in rows):
        raise UserError(f"{path}: holds no rows of a benchmark: choose another file")
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")


def with_row(rows: Sequence[Row], fresh: Row) -> list[Row]:
    """The rows with this one in the place of an older one of the same name, device and precision."""
    place = next((number for number, row in enumerate(rows) if _key(row) == _key(fresh)), len(rows))
    return [*rows[:place], fresh, *rows[place + 1 :]]


def fill(path: Path, rows: Sequence[Row]) -> None:
    """Make every table of rows on a page anew."""
    fill_places(path, "rows", lambda names: table(rows, names))


def fill_places(path: Path, kind: str, made: Callable[[Sequence[str]], str]) -> None:
    """Put something new into all places of a kind on a page, made from the names that stand there.

    Raises:
        UserError: the page is missing, or has no such place.
    """
    count = 0

    def filled(place: re.Match[str]) -> str:
        nonlocal count
        if place["kind"] != kind:
            return place[0]
        count += 1
        return place[1] + made(place["names"].split()) + place[4]

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    text = PLACE.sub(filled, text)
    if not count:
        raise UserError(f"{path}: has no place such as <!-- {kind}: name --> ... <!-- end -->")
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Markdown: the rows whose names begin with one of ``names``, and the machines that they were measured on."""
    chosen = [row for name in names for row in rows if _begins(row["name"], name)]
    if not chosen:
        return f"Not measured yet: `python scripts/benchmark.py {' '.join(names)}`.\n"
    lines = ["| row | ours | against | unit | ratio | bar | passes alone | by the clock | peak memory |", "|---" * 9 + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in chosen]
    machines = dict.fromkeys(machine(row["machine"]) for row in chosen)
    return "\n".join([*lines, "", *(f"{made}  " for made in machines)]) + "\n"


def machine(facts: Mapping[str, Any]) -> str:
    threads = "" if facts["device"].startswith("cuda") else f", {facts['threads']} threads"
    return f"{facts['name']}{threads}, torch {facts['torch']}"


def _key(row: Row) -> tuple[str, str, str]:
    return row["name"], row["machine"]["device"], row["machine"]["precision"]


def _begins(name: str, start: str) -> bool:
    return name == start or (name.startswith((f"{start}_", f"{start},")) and start in ("agreement", "latency", "predictions"))


def _cells(row: Row) -> list[str]:
    ends, against = row.get("range", {}), row.get("against", "baseline")
    precision = "" if row["machine"]["precision"] == "float32" or row["name"].startswith("agreement") else ", bfloat16"
    bar = "" if row["bar"] is None else f"{row['bar']:g} or {row['better']}: {'holds' if row['holds'] else '**falls short**'}"
    share = row.get("share_of_bound")
    both = [side for side in ("ours", against) if side in row.get("wall", {})]
    return [
        f"`{row['name']}`{precision}: {row['what']}",
        spread(row["ours"], ends.get("ours")),
        "" if row["baseline"] is None else spread(row["baseline"], ends.get(against)),
        row["unit"],
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        bar,
        "" if share is None else f"{share:.2f}",
        ", ".join(f"{row['wall'][side]:.3g}" for side in both) + (" s" if both else ""),
        ", ".join(f"{row['memory'][side]:.2f}" for side in both) + (" GB" if both else ""),
    ]
