"""Figures: what is drawn lies where its number says, inside the frame, and is escaped."""

import itertools
import re

import pytest
from pages import Element, read

from dmoe.report import svg


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def numbers(elements: list[Element], name: str) -> list[float]:
    return [float(element.attributes[name]) for element in elements]


def drawn(picture: str) -> Element:
    (found,) = read(picture).all("svg")
    return found


def test_bars_are_as_long_as_their_values_and_begin_at_zero() -> None:
    groups = {"a": [(0.2, None), (0.4, 0.05)], "b": [(0.8, None), None]}
    found = drawn(svg.bars(groups, series=["one", "two"], styles=[0, 1], label="accuracy", say=percent))
    widths, starts = (numbers(found.all("rect"), name) for name in ("width", "x"))
    assert [width / widths[0] for width in widths] == pytest.approx([1, 2, 4], rel=0.01)
    assert len(set(starts)) == 1
    zero = next(text for text in found.all("text") if text.text == "0")
    assert float(zero.attributes["x"]) == starts[0]
    whisker = found.all("line", class_="whisker")[0].attributes
    assert (float(whisker["x2"]) - float(whisker["x1"])) / widths[1] == pytest.approx(0.1 / 0.4, rel=0.01)
    assert "a: 20.0, 40.0 (35.0 to 45.0); b: 80.0, not known." in found.attributes["aria-label"]


def test_on_a_logarithmic_axis_doublings_are_equally_far_apart_and_have_ticks() -> None:
    line = svg.Series("one", [(8, 0.5, None), (16, 0.6, 0.01), (64, 0.7, None)], 0)
    found = drawn(svg.lines([line], svg.Axes("images", "accuracy", percent, log2=True, levels={"plain": (0.55, 1)})))
    x = numbers(found.all("circle"), "cx")
    assert x[2] - x[1] == pytest.approx(2 * (x[1] - x[0]), abs=0.3)
    assert {"8", "16", "64"} <= {text.text for text in found.all("text")}
    level, y = float(found.all("line", class_="level s1")[0].attributes["y1"]), numbers(found.all("circle"), "cy")
    assert level == pytest.approx((y[0] + y[1]) / 2, abs=0.2)
    assert "level of plain: 55.0; one: 50.0 at 8, 60.0 at 16, 70.0 at 64." in found.attributes["aria-label"]


def test_a_heat_map_is_darkest_where_the_value_is_highest() -> None:
    values = [[0.1, 0.6, 0.3], [0.0, 0.2, 0.8]]
    found = drawn(svg.heat_map(values, rows=["a", "b"], columns=["1", "2", "3"], label="attention", say=percent))
    shades = numbers(found.all("rect"), "fill-opacity")
    flat = [value for row in values for value in row]
    assert sorted(range(6), key=shades.__getitem__) == sorted(range(6), key=flat.__getitem__)
    assert [text.text for text in found.all("text")][3:] == ["a", "10.0", "60.0", "30.0", "b", "0.0", "20.0", "80.0"]
    assert "a: 10.0, 60.0, 30.0; b: 0.0, 20.0, 80.0." in found.attributes["aria-label"]


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.3, 0.3), (-0.5, 0.5), (1e-12, 1.0), (-3e14, 2e14), (0.71, 0.7100000001)])
def test_everything_is_inside_the_frame(values: tuple[float, float]) -> None:
    series = [svg.Series("one", [(1, values[0], None), (2, values[1], abs(values[1]) / 10)], 3)]
    pictures = [
        svg.lines(series, svg.Axes("x", "y", percent)),
        svg.bars({"a": [(value, 0.01) for value in values]}, series=["1", "2"], styles=[0, 1], label="y", say=percent),
        svg.heat_map([values], rows=["a"], columns=["1", "2"], label="y", say=percent),
    ]
    for found in map(drawn, pictures):
        width, height = map(float, found.attributes["viewbox"].split()[2:])
        for element in itertools.chain(found.all("rect"), found.all("line"), found.all("text"), found.all("circle")):
            for name, value in element.attributes.items():
                if re.fullmatch(r"c?[xy][12]?", name):
                    assert -0.1 <= float(value) <= (width if "x" in name else height) + 0.1, (name, value)


def test_one_point_is_a_figure_too() -> None:
    found = drawn(svg.lines([svg.Series("one", [(5, 0.5, None)], 0)], svg.Axes("x", "y", percent)))
    assert len(found.all("circle")) == 1


def test_styles_differ_by_shape_and_not_by_colour_alone() -> None:
    shapes = {
        re.sub(r" s\d|-?\d+(\.\d+)?", "", svg.marker(50, 50, style)) + str("-8h" in svg.marker(50, 50, style))
        for style in range(svg.COLOURS)
    }
    assert len(shapes) == svg.COLOURS


def test_names_are_escaped_and_long_ones_cut_in_the_picture_alone() -> None:
    name = '<b onclick="x">' + "n" * 60
    text = svg.bars({name: [(0.5, None)]}, series=[name], styles=[0], label=name, say=percent)
    assert "<b" not in text
    found = drawn(text)
    assert name in found.attributes["aria-label"]
    assert max(len(one.text) for one in found.all("text")) == svg.LONGEST_LABEL
