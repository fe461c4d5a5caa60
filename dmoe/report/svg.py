"""Bars, lines and heat maps as inline SVG. Colours are CSS variables of the page; each figure says in words what it shows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

COLOURS = 8
"""Series that the page's style sheet can tell apart by colour, dash and marker."""

WIDTH = 560
LETTER = 9.0
"""Width of a letter at most, on a phone, where the style sheet makes them larger."""

LONGEST_LABEL = 24
MOST_OWN_TICKS = 5
"""Where there are no more values of x than that, each has its tick."""


Say = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        points: ``(x, y, half of an interval or None)``, by ascending x.
        style: number of its colour, dash and marker.
    """

    name: str
    points: Sequence[tuple[float, float, float | None]]
    style: int


@dataclass(frozen=True)
class Axes:
    """What the axes of lines say.

    Attributes:
        levels: horizontal lines, by name: ``(y, style)``.
        y_range: the lowest and highest y, where several figures are to have the same.
    """

    x: str
    y: str
    say: Say
    log2: bool = False
    levels: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """A picture whose patches have numbers.

    Attributes:
        image: a PNG in base64.
        chosen: a number for each patch, row by row.
    """

    image: str
    chosen: Sequence[int]


def bars(
    groups: Mapping[str, Sequence[tuple[float, float | None] | None]],
    *,
    series: Sequence[str],
    styles: Sequence[int],
    label: str,
    say: Say,
) -> Markup:
    """Horizontal bars in groups, each with an interval.

    Args:
        groups: by name, for each of the series ``(value, half of the interval or None)``, or None.
        label: what the values are.
        say: a value as text.
    """
    ends = [v + sign * (half or 0) for group in groups.values() for one in group if one for v, half in [one] for sign in (-1, 1)]
    low, high, ticks = _nice(min(0.0, *ends), max(ends))  # bars begin at zero: their length is their value
    gutter = LETTER * min(LONGEST_LABEL, max(len(name) for name in groups)) + 10
    thick, top = 9.0, 34.0
    pitch = thick * len(series) + 12
    height = top + pitch * len(groups) + 8

    def x(value: float) -> float:
        return gutter + (WIDTH - gutter - 24) * (value - low) / (high - low)

    parts = [_vertical_tick(x(tick), top - 8, height - 6, _short(say(tick))) for tick in ticks]
    told = []
    for row, (name, group) in enumerate(groups.items()):
        y = top + pitch * row
        parts.append(_text(gutter - 8, y + thick * len(series) / 2, name, anchor="end"))
        for place, (one, style) in enumerate(zip(group, styles, strict=True)):
            if one is None:
                continue
            value, half = one
            begin = y + thick * place
            parts.append(_rectangle(x(low), begin, x(value) - x(low), thick - 1.5, f"fill s{style}"))
            if half:
                middle = begin + (thick - 1.5) / 2
                parts.append(_line(x(value - half), middle, x(value + half), middle, "whisker"))
        told.append(f"{name}: {', '.join('not known' if one is None else _with_half(one, say) for one in group)}")
    alternative = f"Bars of {label} for {', '.join(series)}. {'; '.join(told)}."
    return _figure(height, parts, alternative)


def lines(series: Sequence[Series], axes: Axes, *, width: int = WIDTH, height: int = 320, kind: str = "") -> Markup:
    """Lines with markers, and horizontal levels."""
    xs = sorted({point[0] for one in series for point in one.points})
    ends = [y + sign * (half or 0) for one in series for _, y, half in one.points for sign in (-1, 1)]
    ends += [level for level, _ in axes.levels.values()]
    low, high, ticks = _nice(*(axes.y_range or (min(ends), max(ends))))
    left, bottom, top, right = 58.0, 46.0, 32.0, 20.0
    scale: Callable[[float], float] = math.log2 if axes.log2 else float
    first, last = scale(xs[0]), scale(xs[-1])

    def x(value: float) -> float:
        share = (scale(value) - first) / (last - first) if last > first else 0.5
        return left + 8 + (width - left - right - 16) * share

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * (value - low) / (high - low)

    parts = []
    for tick in ticks:
        parts += [
            _line(left, y(tick), width - right, y(tick), "grid"),
            _text(left - 8, y(tick), _short(axes.say(tick)), anchor="end"),
        ]
    shown = xs if axes.log2 or len(xs) <= MOST_OWN_TICKS else _nice(xs[0], xs[-1])[2]
    for tick in shown:
        if xs[0] <= tick <= xs[-1]:
            parts.append(_text(x(tick), height - bottom + 16, f"{tick:g}", anchor="middle"))
    parts.append(_text((left + width - right) / 2, height - 9, axes.x, anchor="middle", kind="title"))
    parts.append(_text(2, 9, axes.y, anchor="start", kind="title"))
    told = []
    for name, (level, style) in axes.levels.items():
        parts.append(_line(left, y(level), width - right, y(level), f"level s{style}"))
        told.append(f"level of {name}: {axes.say(level)}")
    for one in series:
        path = " ".join(f"{'L' if place else 'M'}{x(px):.1f} {y(py):.1f}" for place, (px, py, _) in enumerate(one.points))
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(one.style, path))
        for px, py, half in one.points:
            if half:
                parts.append(_line(x(px), y(py - half), x(px), y(py + half), f"bar s{one.style}"))
            parts.append(marker(x(px), y(py), one.style))
        told.append(f"{one.name}: {', '.join(f'{axes.say(py)} at {px:g}' for px, py, _ in one.points)}")
    alternative = f"Lines of {axes.y} by {axes.x}{', on a logarithmic axis' if axes.log2 else ''}. {'; '.join(told)}."
    return _figure(height, parts, alternative, width=width, kind=kind)


def heat_map(values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], label: str, say: Say) -> Markup:
    """A table of numbers as shades; each is written into its cell where there is room."""
    highest = max((value for row in values for value in row), default=0.0) or 1.0
    gutter = LETTER * min(LONGEST_LABEL, max(len(name) for name in rows)) + 10
    top, tall = 26.0, 26.0
    wide = (WIDTH - gutter - 4) / len(columns)
    height = top + tall * len(rows) + 4
    parts = [_text(gutter + wide * (n + 0.5), 12, name, anchor="middle") for n, name in enumerate(columns) if wide > 22]
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * row
        parts.append(_text(gutter - 8, y + tall / 2, name, anchor="end"))
        for column, value in enumerate(line):
            share = max(0.0, value) / highest
            x = gutter + wide * column
            cell = '<rect class="heat" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}"/>'
            parts.append(Markup(cell).format(x, y, wide - 1.5, tall - 1.5, 0.04 + 0.96 * share**2))
            if wide > 30:
                kind = "dark" if share**2 > 0.6 else "light"
                parts.append(_text(x + wide / 2, y + tall / 2, say(value), anchor="middle", kind=kind))
    told = [f"{name}: {', '.join(map(say, line))}" for name, line in zip(rows, values, strict=True)]
    return _figure(height, parts, f"Heat map of {label}, columns {', '.join(columns)}. {'; '.join(told)}.")


def patches(panels: Sequence[Panel], *, grid: tuple[int, int], styles: Mapping[int, int], label: str) -> Markup:
    """Pictures side by side, and under each the same with the patches of experts coloured.

    Args:
        grid: rows and columns of patches.
        styles: by expert, from 0; a patch of another one keeps the picture's colours.
        label: of what layer.
    """
    rows, columns = grid
    gap, top = 8.0, 20.0
    wide = min(120.0, (WIDTH - gap * (len(panels) - 1)) / len(panels))
    tall = wide * rows / columns
    edge_x, edge_y = wide / columns, tall / rows
    below = top + tall + gap
    form = '<image x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none" href="{}"/>'
    parts, told = [], []
    for place, panel in enumerate(panels):
        x, source = (wide + gap) * place, f"data:image/png;base64,{panel.image}"
        parts.append(_text(x + wide / 2, 9, str(place + 1), anchor="middle"))
        parts += [Markup(form).format(x, y, wide, tall, source) for y in (top, below)]
        for expert in sorted(set(panel.chosen)):
            if expert in styles:
                inside = [
                    _rectangle(x + edge_x * column, below + edge_y * row, edge_x * length, edge_y, f"fill patch s{styles[expert]}")
                    for row, column, length in _runs(panel.chosen, columns, expert)
                ]
                parts.append(Markup("<g><title>expert {}</title>{}</g>").format(expert + 1, Markup("").join(inside)))
        often = sorted(set(panel.chosen), key=lambda expert: (-panel.chosen.count(expert), expert))
        told.append(f"picture {place + 1}: {', '.join(f'expert {e + 1} {panel.chosen.count(e)}' for e in often)}")
    alternative = f"Pictures, and their {rows * columns} patches by the expert of {label} that they chose first. {'; '.join(told)}."
    return _figure(below + tall, parts, alternative)


def marker(x: float, y: float, style: int) -> Markup:
    """A mark of a shape of its own for each style."""
    shapes = (
        '<circle class="mark s{n}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        '<rect class="mark s{n}" x="{a:.1f}" y="{b:.1f}" width="7" height="7"/>',
        '<path class="mark s{n}" d="M{x:.1f} {t:.1f}l4.5 8h-9z"/>',
        '<path class="mark s{n}" d="M{x:.1f} {t:.1f}l5 5 -5 5 -5 -5z"/>',
        '<path class="mark s{n}" d="M{x:.1f} {u:.1f}l4.5 -8h-9z"/>',
        '<circle class="mark hollow s{n}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>',
        '<rect class="mark hollow s{n}" x="{a:.1f}" y="{b:.1f}" width="7" height="7"/>',
        '<path class="mark hollow s{n}" d="M{x:.1f} {t:.1f}l4.5 8h-9z"/>',
    )
    places = {"x": x, "y": y, "a": x - 3.5, "b": y - 3.5, "t": y - 5, "u": y + 5}
    return Markup(shapes[style % COLOURS]).format(n=style % COLOURS, **places)


def key(style: int, *, kind: str) -> Markup:
    """What stands before a name in a legend: a piece of ``line``, ``level`` or ``bar``."""
    inside = {
        "line": Markup('<path class="line s{}" d="M1 8H27"/>').format(style) + marker(14, 8, style),
        "level": Markup('<path class="level s{}" d="M1 8H27"/>').format(style),
        "bar": _rectangle(4, 3, 20, 10, f"fill s{style}"),
    }[kind]
    return Markup('<svg class="key" viewBox="0 0 28 16" width="28" height="16" aria-hidden="true">{}</svg>').format(inside)


def _figure(height: float, parts: Sequence[Markup], alternative: str, *, width: int = WIDTH, kind: str = "") -> Markup:
    opening = Markup('<svg class="chart {}" role="img" viewBox="0 0 {} {:.0f}" aria-label="{}">').format(
        kind, width, height, alternative
    )
    return opening + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, text: str, *, anchor: str, kind: str = "") -> Markup:
    shown = text if len(text) <= LONGEST_LABEL or kind == "title" else f"{text[: LONGEST_LABEL - 1]}…"
    form = '<text class="{}" x="{:.1f}" y="{:.1f}" dy=".35em" text-anchor="{}">{}</text>'
    return Markup(form).format(kind, x, y, anchor, shown)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    form = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(form).format(kind, x1, y1, x2, y2)


def _rectangle(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    form = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
    return Markup(form).format(kind, x, y, max(0.0, width), height)


def _vertical_tick(x: float, top: float, bottom: float, text: str) -> Markup:
    return _line(x, top, x, bottom, "grid") + _text(x, 12, text, anchor="middle")


def _short(tick: str) -> str:
    return tick.removesuffix(".0")


def _with_half(one: tuple[float, float | None], say: Say) -> str:
    value, half = one
    return say(value) if half is None else f"{say(value)} ({say(value - half)} to {say(value + half)})"


def _runs(chosen: Sequence[int], columns: int, expert: int) -> list[tuple[int, int, int]]:
    """Where patches of an expert lie side by side: row, first column, and how many."""
    found: list[tuple[int, int, int]] = []
    for place in (place for place, one in enumerate(chosen) if one == expert):
        row, column = divmod(place, columns)
        if found and found[-1][0] == row and sum(found[-1][1:]) == column:
            found[-1] = (row, found[-1][1], found[-1][2] + 1)
        else:
            found.append((row, column, 1))
    return found


def _nice(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ends of an axis that hold both, and four to seven round ticks from end to end."""
    span = max(high - low, 1e-9 * abs(high)) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return first * step, last * step, [step * tick for tick in range(first, last + 1)]
