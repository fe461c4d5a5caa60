"""What a page is put together from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from dmoe.report.shown import Example


@dataclass(frozen=True)
class Table:
    """Text in cells; the first column names the rows.

    Attributes:
        under: of each column, a second, smaller line under its name.
        notes: the same of a row, by its name.
        strong: names of rows that stand out.
        source: where the numbers come from, where they are not ours.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    under: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    strong: Sequence[str] = ()
    source: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure with the names of its series."""

    picture: Markup
    legend: Sequence[tuple[Markup, str]] = ()
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page; with neither figure nor table, ``text`` says what is missing.

    Attributes:
        folded: tables behind a line that opens them, by that line.
        examples: by domain.
        raw: text to be shown as it is, by what it is.
        wide: whether each of several figures has the whole width.
    """

    name: str
    title: str
    text: Sequence[str]
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    folded: Sequence[tuple[str, Table]] = ()
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    raw: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False
