"""The part of a page about experts inside the student: where patches go, drawn, and how alike that is across domains."""

from collections import Counter
from collections.abc import Sequence

from dmoe.report import svg
from dmoe.report.parts import Chart, Section, Table
from dmoe.report.selection import Layer, Selection

DOMAINS_SHOWN = 30
LAYERS_DRAWN = 4
"""The last ones; each has all pictures again."""

MISSING = "\N{EN DASH}"


def selection_section(selection: Selection) -> Section:
    """Pictures, one heat map a layer, and what can be told in numbers."""
    layers = selection.layers
    text = [
        f"{selection.network} has layers of several experts each, of which a router chooses some for every patch of an image; "
        "these are parts of one network, not the experts that learned from groups of domains. "
        f"Shares are of {'choices' if any(layer.top_k > 1 for layer in layers) else 'patches'}, over some images of each domain."
    ]
    charts = []
    if selection.pictures:
        told = [f"{n}: {one.domain}, truly {one.truth}" for n, one in enumerate(selection.pictures, start=1)]
        text.append(f"The pictures are {'; '.join(told)}. The colour of a patch is the expert that it chose first.")
        charts += [_drawn(selection, number) for number in range(len(layers))[-LAYERS_DRAWN:]]
    charts += [_map(layer) for layer in layers]
    split = _last(layers[0])
    text.append(
        "Agreement of two domains is 1 minus the total variation between their shares: 1 where the same experts work for both "
        "alike, 0 where no expert works for both; the table has its mean over pairs of domains. Information is mutual "
        f"information of a patch's expert with the domain, or the class, of its image, in {split} images, divided by the mean "
        "of the two entropies: 0 where the one says nothing of the other, 1 where each tells the other. Between equal domains "
        "it is a little above 0 by chance."
    )
    folded = [(f"{_name(layer)}: shares of all domains", _table(layer)) for layer in layers]
    return Section(
        "selection",
        "Which expert a patch goes to",
        text,
        charts,
        tables=[("Agreement across domains", _numbers(layers))],
        folded=folded,
        wide=True,
    )


def styles_of(layer: Layer, chosen: Sequence[Sequence[int]]) -> dict[int, int]:
    """The style of each expert, by its number: its own while there are enough, else the most chosen ones of ``chosen`` have one."""
    if layer.experts <= svg.COLOURS:
        return {expert: expert for expert in range(layer.experts)}
    counted = Counter(expert for of in chosen for expert in of)
    most = sorted(counted, key=lambda expert: (-counted[expert], expert))[: svg.COLOURS]
    return {expert: style for style, expert in enumerate(sorted(most))}


def _drawn(selection: Selection, number: int) -> Chart:
    layer, grid = selection.layers[number], selection.grid
    assert grid is not None
    chosen = [picture.chosen[number] for picture in selection.pictures]
    styles = styles_of(layer, chosen)
    panels = [svg.Panel(picture.image, experts) for picture, experts in zip(selection.pictures, chosen, strict=True)]
    legend = [(svg.key(style, kind="bar"), f"expert {expert + 1}") for expert, style in styles.items()]
    picture = svg.patches(panels, grid=grid, styles=styles, label=_name(layer))
    some = "" if len(styles) == layer.experts else f"; only the {len(styles)} that most patches here chose have colours"
    return Chart(picture, legend, title=f"{_name(layer)}: the expert that each patch chose first{some}")


def _map(layer: Layer) -> Chart:
    split = _last(layer)
    last = layer.splits[split]
    rows = [f"all of {name}" for name in layer.splits] + list(last.domains[:DOMAINS_SHOWN])
    values = [one.load for one in layer.splits.values()] + list(last.shares[:DOMAINS_SHOWN])
    columns = [str(number) for number in range(1, layer.experts + 1)]
    label = f"share of each expert of {_name(layer)}, by split and {split} domain, in percent"
    picture = svg.heat_map(values, rows=rows, columns=columns, label=label, say=_percent)
    even = f"even would be {_percent(1 / layer.experts)}"
    return Chart(picture, title=f"{_name(layer)}: share of each expert (columns), by split and {split} domain, in percent; {even}")


def _numbers(layers: Sequence[Layer]) -> Table:
    splits = list(layers[0].splits)
    last = splits[-1]
    head = ["layer", "experts", *(f"agreement of {name} domains" for name in splits)]
    head += [f"agreement of {last} with source", "information: domain", "information: class"]
    rows = []
    for layer in layers:
        of = [layer.splits[name].agreement if name in layer.splits else None for name in splits]
        one = layer.splits[_last(layer)]
        numbers = [_number(value, 2) for value in (*of, one.with_source)] + [_number(v, 3) for v in (one.by_domain, one.by_class)]
        rows.append([_name(layer), f"{layer.top_k} of {layer.experts}", *numbers])
    return Table(head, rows, ["", "for a patch", *["0 to 1"] * (len(head) - 2)])


def _table(layer: Layer) -> Table:
    head = ["domain", *(str(number) for number in range(1, layer.experts + 1))]
    rows = []
    for split, one in layer.splits.items():
        named = [(f"all of {split}", one.load), *zip((f"{split}: {name}" for name in one.domains), one.shares, strict=True)]
        rows += [[name, *map(_percent, shares)] for name, shares in named]
    return Table(head, rows, ["share in percent, of expert", *[""] * layer.experts])


def _last(layer: Layer) -> str:
    """The split that is reported."""
    return list(layer.splits)[-1]


def _name(layer: Layer) -> str:
    return layer.name.removesuffix(".mlp")


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
