"""Hours and bytes of a recipe by made-up rates, worked out by hand."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from told import one_line

from dmoe.errors import UserError
from scripts import scaling
from scripts.scaling import RECIPES, Rates, hours, markdown, published_hours, recipe_run

FREE = Rates(
    forward=0,
    train=0,
    aggregate=0,
    chunks=0,
    whole=0,
    published_meta=0,
    chunks_memory=1.0,
    whole_memory=1.5,
    published_memory=2.0,
    budget=12.0,
)
MACHINE = {"device": "cpu", "name": "a CPU", "threads": 2, "torch": "2"}


def iwildcam(**rates: float) -> tuple[dict[str, float], dict[str, float]]:
    """Ours and as published, on one device, in units of the seconds that the rates are given in."""
    run, chosen = recipe_run("iwildcam", RECIPES["iwildcam"]), dataclasses.replace(FREE, **rates)
    return (
        {stage: 3600 * value for stage, value in hours(run, chosen, gpus=1).items()},
        {stage: 3600 * value for stage, value in published_hours(run, chosen, gpus=1).items()},
    )


def test_tokens_are_every_source_and_validation_image_through_every_expert_once() -> None:
    ours, plain = iwildcam(forward=1.0)
    assert ours["tokens"] == pytest.approx(10 * (129_809 + 14_961))
    assert plain["tokens"] == 0


def test_published_aggregator_pretraining_asks_every_expert_at_every_step() -> None:
    ours, plain = iwildcam(forward=1.0)
    assert ours["aggregator"] == 0
    steps = 12 * (129_809 // 32)
    assert plain["aggregator"] == pytest.approx(10 * (steps * 32 + 12 * 14_961))


def test_both_ways_train_experts_and_student_alike() -> None:
    ours, plain = iwildcam(train=1.0)
    assert ours["student"] == plain["student"] == pytest.approx(12 * (129_809 // 16) * 16)
    assert ours["experts"] == plain["experts"]


def test_published_meta_training_asks_the_experts_and_looks_at_the_query_twice() -> None:
    ours, plain = iwildcam(forward=1.0)
    updates = 20 * (129_809 // 40)
    assert plain["meta"] - ours["meta"] == pytest.approx(updates * (24 * 10 + 16))


def test_each_way_has_its_own_cost_of_a_meta_step() -> None:
    images = 20 * (129_809 // 40) * 40
    for rates, seconds in (
        ({"whole": 2.0, "chunks": 3.0}, 2.0),
        ({"whole": 3.0, "chunks": 2.0}, 2.0),
        ({"whole": 2.0, "chunks": 3.0, "whole_memory": 13.0}, 3.0),  # does not fit
    ):
        ours, plain = iwildcam(published_meta=5.0, **rates)
        assert (ours["meta"], plain["meta"]) == (pytest.approx(seconds * images), pytest.approx(5 * images))


def test_several_gpus_share_tokens_tests_and_the_episodes_of_an_update() -> None:
    run = recipe_run("iwildcam", RECIPES["iwildcam"])
    four = dataclasses.replace(
        run, config=run.config.model_copy(update={"meta": run.config.meta.model_copy(update={"domains_per_update": 4})})
    )
    rates = dataclasses.replace(FREE, forward=1.0, train=1.0, whole=1.0, chunks=1.0)
    for each, share in ((run, 1), (four, 4)):
        one, eight, free = (
            hours(each, r, gpus=g) for r, g in ((rates, 1), (rates, 8), (dataclasses.replace(rates, whole=0, chunks=0), 1))
        )
        looks = free["meta"]
        assert eight["meta"] == pytest.approx((one["meta"] - looks) / share + looks / 8)
        assert eight["tokens"] == pytest.approx(one["tokens"] / 8) and eight["test"] == pytest.approx(one["test"] / 8)
        assert (eight["aggregator"], eight["student"]) == (one["aggregator"], one["student"])
    plain = published_hours(four, rates, gpus=8)
    assert plain["meta"] == pytest.approx(published_hours(four, rates, gpus=1)["meta"]) and plain["test"] == pytest.approx(
        one["test"]
    )


@pytest.mark.parametrize(("gpus", "share"), [(1, 1.0), (8, 1 / 8), (16, 1 / 10)])
def test_experts_are_shared_out_to_as_many_gpus_as_there_are_experts(gpus: int, share: float) -> None:
    run, rates = recipe_run("iwildcam", RECIPES["iwildcam"]), dataclasses.replace(FREE, train=1.0)
    one, several = hours(run, rates, gpus=1), hours(run, rates, gpus=gpus)
    assert several["experts"] == pytest.approx(share * one["experts"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_images_and_domains(name: str) -> None:
    run, recipe = recipe_run(name, RECIPES[name]), RECIPES[name]
    for split, size in (("source", recipe.source), ("validation", recipe.validation), ("target", recipe.target)):
        found = run.dataset.splits[split]
        assert (len(found), len(found.members), len(found.group_domains.unique())) == (size.images, size.domains, size.groups)
    assert set(run.groups.values()) == set(range(run.config.experts.count))


def test_the_page_says_whose_figures_these_are() -> None:
    rates = dict.fromkeys(RECIPES, dataclasses.replace(FREE, forward=1.0, train=1.0, chunks=1.0, whole=1.0, published_meta=1.0))
    text = markdown(rates, MACHINE)
    assert "**a CPU, 2 threads, torch 2**" in text
    assert "These are figures of that CPU, extrapolated." in text
    assert "figures of that GPU" in markdown(rates, {**MACHINE, "device": "cuda"})
    tokens = 4 * 10 * 2048 * (129_809 + 14_961) / 1e9
    assert f"| `iwildcam` | 1.5 | 1.0 | 2.0 | one graph | {tokens:.1f} | 12.0 |" in text


def test_saved_rates_make_the_same_page(tmp_path: Path) -> None:
    rates = {
        name: dataclasses.asdict(dataclasses.replace(FREE, forward=1.0, train=1.0, chunks=1.0, whole=1.0, published_meta=1.0))
        for name in RECIPES
    }
    (tmp_path / "rates.json").write_text(json.dumps({"machine": MACHINE, "rates": rates}))
    scaling.main(["--rates", str(tmp_path / "rates.json"), "--page", str(tmp_path / "scaling.md")])
    assert (tmp_path / "scaling.md").read_text() == markdown({name: Rates(**found) for name, found in rates.items()}, MACHINE)


def test_a_few_batches_of_a_small_recipe_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclasses.replace(scaling.KINDS["poverty"], size=32)
    monkeypatch.setitem(scaling.KINDS, "poverty", kind)
    found = scaling.measure("poverty", recipe_run("poverty", RECIPES["poverty"]), images=4)
    assert all(math.isfinite(value) and value > 0 for value in dataclasses.asdict(found).values())
    assert found.whole_memory > found.chunks_memory / 4 and found.published_memory > found.chunks_memory / 4


@pytest.mark.parametrize("content", ["{", "[]", '{"rates": {"iwildcam": {}}, "machine": {}}'])
def test_rates_that_cannot_be_read_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "rates.json").write_text(content)
    with pytest.raises(UserError) as caught:
        scaling.main(["--rates", str(tmp_path / "rates.json")])
    assert one_line(caught).startswith(f"{tmp_path / 'rates.json'}: cannot be read as rates")
