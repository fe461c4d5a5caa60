"""Sentences and a picture of made-up figures."""

import dataclasses
import json
from pathlib import Path

import pytest
from told import one_line

from dmoe.errors import UserError
from scripts import benchmark_growth as growth
from scripts.benchmark_growth import Point, sentences, slope
from scripts.benchmarks.inputs import Setting
from scripts.benchmarks.measuring import Place

MACHINE = {"device": "cpu", "name": "a CPU", "threads": 2, "torch": "2"}


def line(panel: str, side: str, *, cpu: float, memory: float, values: tuple[int, ...] = (2, 4, 8)) -> list[Point]:
    """Figures that grow by so much with each further one."""
    return [Point(panel, value, side, 1 + cpu * value, 0.0, 2 + memory * value) for value in values]


def made_up() -> list[Point]:
    support = [
        *line("support", "published", cpu=0.25, memory=0.5),
        *line("support", "whole", cpu=0.125, memory=0.25),
        *line("support", "chunks", cpu=0.0625, memory=0.0),
    ]
    backbones = [
        Point("backbone", name, side, cpu, 0.0, memory)
        for name in ("resnet18", "timm:vit_small_patch16_224")
        for side, cpu, memory in (("published", 6.0, 8.0), ("whole", 3.0, 4.0), ("chunks", 4.0, 2.0))
    ]
    return support + backbones


def test_a_slope_is_the_least_squares_line() -> None:
    points = [Point("support", value, "whole", cpu, 0, 0) for value, cpu in ((0, 0.0), (1, 2.0), (2, 1.0))]
    assert slope(points, "cpu") == pytest.approx(0.5)


def test_a_panel_has_one_sentence_of_its_numbers() -> None:
    assert sentences(made_up(), size=64) == [
        "Each further support image costs 250 CPU ms and 500 MB as published, 125 ms and 250 MB in our one graph, "
        "62 ms and 0 MB in chunks of 8.",
        "Of what the published way takes at 64x64, ours takes: "
        "ResNet-18 0.50 of the time in one graph, 0.67 of it and 0.25 of the memory in chunks; "
        "ViT-S/16 0.50 of the time in one graph, 0.67 of it and 0.25 of the memory in chunks.",
    ]


def test_figures_are_drawn_again_and_their_sentences_put_into_a_page(tmp_path: Path) -> None:
    figures, picture, text = tmp_path / "growth.json", tmp_path / "growth.png", tmp_path / "page.md"
    points = [dataclasses.asdict(point) for point in made_up()]
    figures.write_text(json.dumps({"machine": MACHINE, "size": 64, "points": points}))
    text.write_text("# Page\n\n<!-- growth: sentences -->\nstale\n<!-- end -->\n")
    growth.main(["--fill", "--json", str(figures), "--picture", str(picture), "--markdown", str(text)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert text.read_text().startswith("# Page\n\n<!-- growth: sentences -->\n- Each further support image costs 250 CPU ms")
    assert "a CPU, 2 threads, torch 2" in text.read_text()
    assert "stale" not in text.read_text()


def test_every_value_of_a_panel_is_measured_in_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PANELS", {"support": ("support images", (2,))})
    base = Setting("small_conv", 14, 4, 2, 3, channels=1)
    points = growth.measured("support", base, Place(threads=1), rounds=1, repeats=1)
    assert [(point.value, point.side) for point in points] == [(2, "published"), (2, "whole"), (2, "chunks")]
    assert all(point.cpu > 0 for point in points)


def test_figures_that_are_missing_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        growth.main(["--fill", "--json", str(tmp_path / "growth.json")])
    assert one_line(caught).startswith(f"{tmp_path / 'growth.json'}: cannot be read as figures")
