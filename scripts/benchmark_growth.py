"""How the cost of a meta-training step grows: with experts, support images and inner steps, and from backbone to backbone.

    python scripts/benchmark_growth.py                                   measure and draw (a quarter of an hour on two cores)
    python scripts/benchmark_growth.py --fill                            draw again from the figures of docs/growth.json
    python scripts/benchmark_growth.py --size 96 --panels support --json growth_96.json --picture growth_96.png

Three ways: as published (live experts, one graph), ours as one graph from stored tokens, and ours in chunks of 8 images. Each runs
in a process of its own. What is not varied is ResNet-18, 4 experts, support 24, query 16, one inner step. Written: the figures, a
picture, a sentence a panel, which --markdown puts into a page.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: waiting threads would count as work

from dmoe.command_line import run_main
from dmoe.errors import UserError
from dmoe.meta.learner import Way
from scripts.benchmarks import inputs, ours, page, published
from scripts.benchmarks.inputs import Setting
from scripts.benchmarks.measuring import Make, Place, in_turn

DOCS = Path(__file__).resolve().parent.parent / "docs"
BASE = Setting("resnet18", 64, 24, 16, 4)
CHUNK = 8
BACKBONES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
    "timm:vit_small_patch16_224": "ViT-S/16",
}
PANELS: Mapping[str, tuple[str, Sequence[Any]]] = {
    "experts": ("experts", (2, 5, 10, 20)),
    "support": ("support images", (8, 16, 32, 64, 128)),
    "inner_steps": ("inner steps", (1, 2, 3, 5)),
    "backbone": ("backbone", tuple(BACKBONES)),
}
"""What varies: a field of the setting, its name for people, its values."""

SIDES = {"published": "as published", "whole": "ours, one graph", "chunks": f"ours, chunks of {CHUNK}"}
COLOURS = {"published": "#c0392b", "whole": "#2c6fbb", "chunks": "#1a7f5a"}
AXES = {"cpu": "CPU seconds a step", "memory": "GB at the peak, above rest"}


@dataclass(frozen=True)
class Point:
    """One way at one value of what varies in a panel."""

    panel: str
    value: Any
    side: str
    cpu: float
    wall: float
    memory: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=BASE.size, help="edge of the images in pixels")
    parser.add_argument("--panels", nargs="+", choices=tuple(PANELS), default=list(PANELS))
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way, in turn")
    parser.add_argument("--repeats", type=int, default=2, help="steps of a process that are timed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=DOCS / "growth.json", metavar="FILE")
    parser.add_argument("--picture", type=Path, default=DOCS / "growth.png", metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="put the sentences into that page")
    parser.add_argument("--fill", action="store_true", help="measure nothing: take the figures that --json FILE holds")
    options = parser.parse_args(arguments)
    if options.fill:
        found = read(options.json)
    else:
        place = Place(threads=options.threads)
        points = []
        for panel in options.panels:
            points += measured(panel, replace(BASE, size=options.size), place, rounds=options.rounds, repeats=options.repeats)
        found = {"machine": place.machine, "size": options.size, "points": [asdict(point) for point in points]}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    points = [Point(**point) for point in found["points"]]
    draw(points, options.picture)
    told = sentences(points, size=found["size"])
    print("\n".join(told))
    if options.markdown:
        text = "".join(f"- {sentence}\n" for sentence in told) + f"\n{page.machine(found['machine'])}\n"
        page.fill_places(options.markdown, "growth", lambda names: text)


def measured(panel: str, base: Setting, place: Place, *, rounds: int, repeats: int) -> list[Point]:
    """All ways at all values of a panel."""
    points = []
    for value in PANELS[panel][1]:
        sides = in_turn(ways(replace(base, **{panel: value})), rounds=rounds, repeats=repeats, place=place)
        for side, measurements in sides.items():
            cpu, wall = (statistics.median(s for m in measurements for s in getattr(m, clock)) for clock in ("cpu", "wall"))
            points.append(Point(panel, value, side, cpu, wall, max(m.memory for m in measurements)))
            print(f"{panel} {value}, {SIDES[side]}: {cpu:.2f} CPU seconds, {points[-1].memory:.2f} GB", flush=True)
    return points


def ways(setting: Setting) -> dict[str, Make]:
    return {
        "published": inputs.published(published.meta_step, setting),
        "whole": inputs.ours(ours.meta_step, setting, way=Way("double_backward")),
        "chunks": inputs.ours(ours.meta_step, setting, way=Way("forward_over_reverse", CHUNK)),
    }


def read(path: Path) -> dict[str, Any]:
    """Figures that an earlier visit wrote.

    Raises:
        UserError: there are none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"machine": found["machine"], "size": int(found["size"]), "points": list(found["points"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as figures ({error}): leave --fill away to measure them") from None


def sentences(points: Sequence[Point], *, size: int) -> list[str]:
    """One a panel: the slopes of the least-squares lines, or for backbones the ratios."""
    told = []
    for panel in dict.fromkeys(point.panel for point in points):
        values = {side: [p for p in points if (p.panel, p.side) == (panel, side)] for side in SIDES}
        if panel == "backbone":
            parts = [
                f"{BACKBONES.get(plain.value, plain.value)} {whole.cpu / plain.cpu:.2f} of the time in one graph, "
                f"{chunks.cpu / plain.cpu:.2f} of it and {chunks.memory / plain.memory:.2f} of the memory in chunks"
                for plain, whole, chunks in zip(*(values[side] for side in ("published", "whole", "chunks")), strict=True)
            ]
            told.append(f"Of what the published way takes at {size}x{size}, ours takes: {'; '.join(parts)}.")
            continue
        thing = {"experts": "expert", "support": "support image", "inner_steps": "inner step"}[panel]
        cpu, memory = ({side: slope(found, field) for side, found in values.items()} for field in ("cpu", "memory"))
        told.append(
            f"Each further {thing} costs {_milli(cpu['published'])} CPU ms and {_milli(memory['published'])} MB as published, "
            f"{_milli(cpu['whole'])} ms and {_milli(memory['whole'])} MB in our one graph, "
            f"{_milli(cpu['chunks'])} ms and {_milli(memory['chunks'])} MB in chunks of {CHUNK}."
        )
    return told


def slope(points: Sequence[Point], field: str) -> float:
    """Of the least-squares line through a field, by what varies."""
    return statistics.linear_regression([float(p.value) for p in points], [getattr(p, field) for p in points]).slope


def _milli(value: float) -> str:
    return f"{1000 * value:.0f}".replace("-0", "0")


def draw(points: Sequence[Point], picture: Path) -> None:
    """A column a panel; time above, memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(point.panel for point in points))
    figure, grid = plt.subplots(2, len(panels), figsize=(3.3 * len(panels), 5.6), layout="constrained", squeeze=False)
    for column, panel in enumerate(panels):
        for axis, field in zip(grid[:, column], AXES, strict=True):
            for number, side in enumerate(SIDES):
                found = [p for p in points if (p.panel, p.side) == (panel, side)]
                heights = [getattr(p, field) for p in found]
                if panel == "backbone":
                    places = [place + 0.27 * (number - 1) for place in range(len(found))]
                    axis.bar(places, heights, width=0.25, color=COLOURS[side])
                    axis.set_xticks(range(len(found)), [BACKBONES.get(p.value, p.value) for p in found], rotation=25, fontsize=8)
                else:
                    axis.plot([p.value for p in found], heights, "o-", color=COLOURS[side], label=SIDES[side], markersize=4)
                    axis.set_xticks([p.value for p in found])
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        grid[1, column].set_xlabel(PANELS[panel][0])
    for axis, label in zip(grid[:, 0], AXES.values(), strict=True):
        axis.set_ylabel(label)
    if grid[0, 0].get_legend_handles_labels()[0]:
        grid[0, 0].legend(frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
