"""The README's tables from the rows in ``docs/results``: what is told there is what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dmoe.console import say
from dmoe.errors import UserError
from dmoe.report.comparison import GROUPS, TEST_TIME, Comparison, Unit, counted, headline, is_first, protocol_text, unit_of
from dmoe.report.files import text_of, write_whole
from dmoe.report.rows import Protocol, Results, read_results
from dmoe.report.statistics import Spread

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

FIRST = "digits"
"""What comes first; the others by title."""


def rewrite(checkout: Path) -> None:
    """Make the section of ``README.md`` agree with ``docs/results/*.jsonl``.

    Raises:
        UserError: there are no results, README has no place for them, or a file is damaged.
    """
    path = checkout / "README.md"
    results = results_in(checkout / "docs" / "results")
    if not results:
        raise UserError(f"{checkout / 'docs' / 'results'}: holds no .jsonl file: put the results.jsonl of a comparison there")
    write_whole(path, with_section(text_of(path, way="run this in a checkout"), markdown(results), where=str(path)))
    say(f"{path}: the results of {', '.join(one.dataset for one in results)}")


def results_in(folder: Path) -> list[Results]:
    """All results of a folder, a comparison a file, whose name is the title: ``typefaces.jsonl``, ``digits-transformers.jsonl``.

    Raises:
        UserError: a file is damaged.
    """
    found = [replace(read_results(path), dataset=path.stem.replace("-", ", ")) for path in sorted(folder.glob("*.jsonl"))]
    return sorted(found, key=lambda one: (one.dataset != FIRST, one.dataset))


def section_of(readme: str, *, where: str) -> str | None:
    """What is between the marks; None where there are none.

    Raises:
        UserError: there is one without the other, or one twice.
    """
    if BEGIN not in readme and END not in readme:
        return None
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise UserError(f"{where}: must have the lines {BEGIN!r} and {END!r} once each, in this order")
    return readme.partition(BEGIN)[2].partition(END)[0]


def with_section(readme: str, section: str, *, where: str) -> str:
    """The text with another section between the marks.

    Raises:
        UserError: it has no marks.
    """
    before = section_of(readme, where=where)
    if before is None:
        raise UserError(f"{where}: has no place for results: write the lines {BEGIN!r} and {END!r} where they are to be")
    return readme.replace(f"{BEGIN}{before}{END}", f"{BEGIN}\n\n{section}\n{END}")


def markdown(results: Sequence[Results]) -> str:
    """All tables of all data sets."""
    return "\n".join(_of_dataset(Comparison(one)) for one in results)


def _of_dataset(comparison: Comparison) -> str:
    unit = unit_of(comparison.results)
    parts = [
        f"### {comparison.results.dataset}",
        f"{headline(comparison)[0]} {is_first(comparison)}".strip(),
        _methods(comparison, unit),
        _support(comparison, unit),
        _protocols(comparison, unit),
        _ablations(comparison, unit),
    ]
    return "\n\n".join(part for part in parts if part).replace("<", "&lt;") + "\n"  # names come from files


def _methods(comparison: Comparison, unit: Unit) -> str:
    head = [unit.name, "mean", "worst domain", f"difference to {comparison.baseline} (95 % interval)"]
    rows = [[one.name, unit.spread(one.mean), unit.spread(one.worst), unit.interval(one.difference)] for one in comparison.lines]
    seeds, domains = counted(len(comparison.seeds), "seed"), counted(len(comparison.domains), "domain")
    said = f"Mean ± standard deviation over {seeds}, {domains}; {protocol_text(comparison.main)}. "
    said += "The interval is a bootstrap of paired differences over domains and seeds."
    return f"{_table(head, rows, strong=comparison.ours)}\n\n{said}"


def _support(comparison: Comparison, unit: Unit) -> str:
    curves = comparison.by_support()
    ranked = [name for name in comparison.methods if name in curves]
    best = next((name for name in ranked if name in TEST_TIME), None)
    names = [name for name in dict.fromkeys((comparison.ours, comparison.best_other, best, comparison.baseline)) if name in curves]
    if not names:
        return ""
    sizes = sorted({size for name in names for size in curves[str(name)]})
    rows = [[str(name), *(unit.spread(curves[str(name)].get(size)) for size in sizes)] for name in names]
    return _table([f"{unit.name}, by unlabeled images", *map(str, sizes)], rows, strong=comparison.ours)


def _protocols(comparison: Comparison, unit: Unit) -> str:
    cells = comparison.by_protocol()
    if not cells:
        return ""
    protocols, main = comparison.protocols(), comparison.main
    told = {name: line for name, line in cells.items() if name == comparison.baseline or not _never_moves(line, protocols)}
    head = [f"{unit.name}, by protocol", *(_heading(protocol, main) for protocol in protocols)]
    table = _table(head, [[name, *map(unit.spread, line)] for name, line in told.items()], strong=comparison.ours)
    in_batches = sorted({protocol.images for protocol in protocols if protocol.images is not None})
    said = f"{main.support_size} images at a time, predicted after the update, all of a domain, unless a column says otherwise."
    said += "".join(f" *: batches of the first {count} images of each domain." for count in in_batches)
    said += " What treats each image by itself is left out but for the baseline." if len(told) < len(cells) else ""
    return f"{table}\n\n{said}"


def _never_moves(line: Sequence[Spread | None], protocols: Sequence[Protocol]) -> bool:
    """Whether results are the same by all protocols that score the same images, and there are such."""
    found: dict[tuple[int | None, bool], set[float | None]] = {}
    for protocol, cell in zip(protocols, line, strict=True):
        found.setdefault((protocol.images, protocol.score_support), set()).add(None if cell is None else cell.mean)
    return len(found) < len(line) and all(len(means) == 1 for means in found.values())


def _heading(protocol: Protocol, main: Protocol) -> str:
    """What is not the same in all columns."""
    parts = [protocol.name + ("" if protocol.images is None else "*")]
    parts += [f"{protocol.support_size} images"] if protocol.support_size != main.support_size else []
    parts += [] if protocol.score_support else ["support not scored"]
    parts += [f"predicted {protocol.predict} the update"] if protocol.predict != "after" else []
    return ", ".join(parts)


def _ablations(comparison: Comparison, unit: Unit) -> str:
    found = comparison.ablations()
    if not found:
        return ""
    head = [f"{unit.name}, one thing changed", "", "mean", "worst domain", f"difference to {comparison.ours} (95 % interval)"]
    rows = [
        [GROUPS.get(group, group), one.name, unit.spread(one.mean), unit.spread(one.worst), unit.interval(one.difference)]
        for group, lines in found.items()
        for one in lines
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, strong: str | None = None) -> str:
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in rows:
        lines.append(_line([f"**{cell}**" for cell in row] if row[0] == strong else row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
