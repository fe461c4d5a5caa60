"""Both sides of a row do the same work; rows, their ratios and their table by made-up measurements."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.errors import UserError
from dmoe.meta.learner import Way
from scripts import benchmark
from scripts.benchmarks import agreement, bounds, demo, inputs, ours, page, published
from scripts.benchmarks.inputs import Episode, Setting
from scripts.benchmarks.measuring import Criterion, Place, Side, Step, in_turn, measured, row, told

TINY = Setting("small_conv", 14, 5, 3, 3, inner_steps=2)
PLACE = Place(threads=1)


def stepped(make: Callable[..., Step], dtype: torch.dtype = torch.float64, **choices: Any) -> dict[str, Tensor]:
    """What student and aggregator are after one step, from the tokens that live experts give."""
    episode = Episode(TINY, PLACE, dtype)
    episode.tokens = published.live_tokens(episode.experts(), episode.x_support)
    make(episode, **choices)()
    return {**episode.student.state_dict(), **{f"teacher.{n}": p for n, p in episode.teacher.state_dict().items()}}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, in units of a step of Adam's."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in other) / inputs.LR


WAYS: dict[str, tuple[Callable[..., Step], dict[str, Any]]] = {
    "double backward": (ours.meta_step, {"way": Way("double_backward")}),
    "forward over reverse": (ours.meta_step, {"way": Way("forward_over_reverse", 2)}),
    "reverse over reverse": (ours.meta_step, {"way": Way("reverse_over_reverse", 2)}),
    "higher": (published.meta_step_by_higher, {}),
    "stored tokens": (published.meta_step, {"live": False}),
}


@pytest.fixture(scope="module")
def as_published() -> dict[str, Tensor]:
    return stepped(published.meta_step)


@pytest.mark.parametrize("way", WAYS)
def test_a_meta_step_changes_the_parameters_as_the_published_one(way: str, as_published: dict[str, Tensor]) -> None:
    make, choices = WAYS[way]
    found = stepped(make, **choices)
    untouched = Episode(TINY, PLACE, torch.float64).student.state_dict()
    assert apart({n: found[n] for n in untouched}, untouched) > 0.5
    # Adam divides by the gradient's own size, so a step agrees as well as the gradients do where those are not tiny.
    assert apart(found, as_published) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_a_meta_step_leaves_the_same_gradients_to_adam(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(make: Callable[..., Step], choices: dict[str, Any]) -> list[Tensor]:
        seen: list[Tensor] = []

        def record(adam: torch.optim.Adam) -> None:
            seen.extend(p.grad.clone() for group in adam.param_groups for p in group["params"] if p.grad is not None)

        monkeypatch.setattr(torch.optim.Adam, "step", record)
        stepped(make, **choices)
        return seen

    plain, found = gradients(published.meta_step, {}), gradients(*WAYS[way])
    assert len(plain) == len(found) > 25
    assert max(float((one - other).norm() / other.norm()) for one, other in zip(found, plain, strict=True)) < 1e-10


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any) -> Any:
        torch.manual_seed(2)
        return make(*arguments)

    return made


def test_both_sides_of_aggregator_pretraining_learn_from_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda adam: seen.append([p.grad.clone() for p in adam.param_groups[0]["params"]])
    )
    for make in (published.aggregator_step, ours.aggregator_step):
        episode = Episode(TINY, PLACE, torch.float64)
        episode.tokens = published.live_tokens(episode.experts(), episode.x_support)
        step = make(episode)
        torch.manual_seed(3)  # of dropout
        step()
    assert max(float((one - other).norm() / other.norm()) for one, other in zip(*seen, strict=True)) < 1e-10


@pytest.mark.parametrize(
    ("make", "choices"),
    [
        (bounds.meta_passes, {"way": Way("forward_over_reverse", 2)}),
        (bounds.adaptation_passes, {}),
        (bounds.forward_passes, {"batch_size": 2}),
        (ours.adaptation, {}),
        (ours.prediction, {}),
    ],
)
def test_a_side_changes_nothing_that_a_second_step_would_see(make: Callable[..., Step], choices: dict[str, Any]) -> None:
    episode = Episode(Setting("small_conv", 14, 4, 2, 2, channels=1), PLACE)
    before = {name: value.clone() for name, value in episode.student.state_dict().items()}
    step = make(episode, **choices)
    step()
    step()
    assert all(torch.equal(value, before[name]) for name, value in episode.student.state_dict().items())


def test_the_token_store_holds_what_the_bare_passes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    episode = Episode(Setting("small_conv", 14, 5, 1, 3, channels=1), PLACE)
    plain = published.live_tokens(episode.experts(), episode.x_support)
    stores = []
    build = ours.build_store
    monkeypatch.setattr(ours, "build_store", lambda *a, **k: stores.append(build(*a, **k)))
    ours.token_store(episode, batch_size=2)()
    torch.testing.assert_close(stores[0][torch.arange(5)], plain)


def test_the_demo_has_its_two_stages_in_the_proportion_of_its_configuration() -> None:
    config = demo.load_config(demo.CONFIG_FOLDER / "digits.yaml")
    few, many = demo.steps_of(config, 1e-9), demo.steps_of(config, 1.0)
    assert many == (config.aggregator.training.duration.count, config.meta.duration.count)
    assert few[0] * many[1] == few[1] * many[0]
    assert min(few) >= 1


@pytest.mark.slow
def test_both_sides_of_the_demo_end_in_the_same_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, schedules and clipping, which make no difference to what a step costs."""
    found = []
    for steps in (demo.our_steps, demo.published_steps):
        made = demo.Demo(PLACE, share=1e-9)
        plain = {"schedule": "constant", "warmup": demo.Duration(0, "steps"), "max_gradient_norm": None}
        config = made.run.config
        training = config.aggregator.training
        training = training.model_copy(update={"optimizer": training.optimizer.model_copy(update=plain)})
        aggregator = config.aggregator.model_copy(update={"training": training})
        adams = {name: getattr(config.meta, name).model_copy(update={**plain, "lr": 1e-4}) for name in ("student", "aggregator")}
        plainer = config.model_copy(update={"aggregator": aggregator, "meta": config.meta.model_copy(update=adams)})
        made.run = dataclasses.replace(made.run, config=plainer)
        for part in made.aggregator.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            if isinstance(part, torch.nn.MultiheadAttention):
                part.dropout = 0.0
        parameters = [*made.student.parameters(), *made.aggregator.parameters()]
        start = agreement.flat(parameters)
        steps(made)()
        found.append(agreement.flat(parameters) - start)
    # Attention's key bias has no gradient but rounding, of which Adam makes steps.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02


def test_agreement_holds_in_float64_and_is_told_in_all_precisions() -> None:
    rows = agreement.rows(PLACE, backbones=["small_conv"], size=14)
    assert len(rows) == len(agreement.PATHS) * len(agreement.PRECISIONS) + 2
    assert all(found["holds"] for found in rows if "float64" in found["name"])
    assert all(found["holds"] is None for found in rows if "float64" not in found["name"])
    assert all(set(found["by_backbone"]) == {"small_conv"} for found in rows)


def sides(**seconds: float) -> dict[str, list[Side]]:
    return {name: [Side((s, 3 * s, 2 * s), (s, s, s), memory=s)] for name, s in seconds.items()}


@pytest.mark.parametrize(
    ("criterion", "ours_is", "baseline_is", "ratio", "unit"),
    [
        (Criterion("r", "", bar=1.5), 4.0, 8.0, 2.0, "CPU seconds"),
        (Criterion("r", "", bar=0.6, better="below"), 4.0, 8.0, 0.5, "CPU seconds"),
        (Criterion("r", "", unit="GB", bar=0.6, better="below"), 2.0, 4.0, 0.5, "GB"),
        (Criterion("r", "", unit="rate", bar=1.9, amount=20), 5.0, 2.5, 2.0, "a CPU second"),
        (Criterion("r", "", unit="rate by the clock", bar=1.9, amount=20), 10.0, 5.0, 2.0, "a second"),
        (Criterion("r", "", unit="milliseconds", bar=1.9), 2000.0, 4000.0, 2.0, "milliseconds"),
    ],
)
def test_ratios_say_how_many_times_better(
    criterion: Criterion, ours_is: float, baseline_is: float, ratio: float, unit: str
) -> None:
    found = row(criterion, sides(ours=2.0, baseline=4.0), PLACE)
    assert (found["ours"], found["baseline"], found["ratio"], found["unit"]) == (ours_is, baseline_is, ratio, unit)
    assert found["holds"]


def test_a_row_that_falls_short_says_so() -> None:
    found = row(Criterion("meta", "a step", bar=3), sides(ours=2.0, baseline=4.0, bound=1.0), PLACE)
    assert not found["holds"]
    assert found["share_of_bound"] == 0.5
    text = told(found)
    assert "ratio 2.00, bar 3 or above: FALLS SHORT; the unavoidable passes alone are 0.50 of it" in text
    assert "ours 4 (2 to 6), baseline 8 (4 to 12) CPU seconds" in text


def test_on_a_gpu_seconds_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = row(Criterion("meta", "a step"), sides(ours=2.0, baseline=4.0), Place(device="cuda"))
    assert (found["ours"], found["unit"], found["machine"]["name"]) == (2.0, "seconds", "a GPU")


def grown(place: Place) -> Step:
    return lambda: torch.ones(50_000_000).sum()


def dying(place: Place) -> Step:
    import os

    os.abort()


def test_memory_is_the_peak_above_rest() -> None:
    found = measured(grown, 2, PLACE)
    assert len(found.cpu) == len(found.wall) == 2
    assert 0.19 < found.memory < 0.25


def test_each_side_runs_in_a_process_of_its_own() -> None:
    found = in_turn({"ours": grown}, rounds=2, repeats=1, place=PLACE)
    assert [len(side.cpu) for side in found["ours"]] == [1, 1]


def test_a_process_that_is_killed_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="ours: its process was killed"):
        in_turn({"ours": dying}, rounds=1, repeats=1, place=PLACE)


def test_every_side_can_be_sent_to_another_process() -> None:
    for comparison in benchmark.COMPARISONS:
        for make in comparison.sides.values():
            assert callable(pickle.loads(pickle.dumps(make)))


def test_rows_have_names_of_their_own() -> None:
    assert len(set(benchmark.ROWS)) == len(benchmark.ROWS)
    assert {"meta_96", "meta_224", "meta_224_memory", "support_memory", "aggregator", "demo", "tokens"} <= set(benchmark.ROWS)
    assert {"meta_bound", "adapt_bound", "latency_resnet18", "predictions_resnet18", "higher", "agreement"} <= set(benchmark.ROWS)


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = benchmark.Comparison({"ours": grown, "bound": grown}, [Criterion("a", "one", against="bound", bar=0.0)])
    monkeypatch.setattr(benchmark, "COMPARISONS", [comparison])
    monkeypatch.setattr(benchmark, "ROWS", ["a", "b"])


def test_an_unknown_row_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        benchmark.main(["meta_97"])
    assert str(caught.value).startswith("command line: unknown row meta_97; known: meta_96, meta_bound")
    assert "\n" not in str(caught.value)


def test_rows_are_written_with_their_machine_and_fill_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    rows, text = tmp_path / "rows.json", tmp_path / "page.md"
    text.write_text("# Page\n\n<!-- rows: a -->\nstale\n<!-- end -->\n\nBetween.\n\n<!-- rows: b -->\n<!-- end -->\n")
    benchmark.main(["a", "--rounds", "1", "--threads", "1", "--json", str(rows), "--markdown", str(text)])
    (found,) = json.loads(rows.read_text())
    assert {"name", "ours", "baseline", "ratio", "unit", "bar", "holds", "share_of_bound", "wall", "memory"} <= found.keys()
    assert {"name", "device", "threads", "precision", "torch"} <= found["machine"].keys()
    assert "a: one" in capsys.readouterr().out
    filled = text.read_text()
    assert "stale" not in filled
    assert "| `a`: one |" in filled
    assert "Not measured yet: `python scripts/benchmark.py b`." in filled
    assert "\n\nBetween.\n\n" in filled
    benchmark.main(["--fill", "--json", str(rows), "--markdown", str(text)])
    assert text.read_text() == filled


def made_up(name: str, value: float, **machine: str) -> dict[str, Any]:
    found = row(Criterion(name, "what"), sides(ours=value, baseline=1.0), PLACE)
    return {**found, "machine": {**found["machine"], **machine}}


def test_a_fresh_row_replaces_its_own_kind_only() -> None:
    rows: list[page.Row] = []
    for fresh in (made_up("a", 1.0), made_up("b", 2.0), made_up("a", 3.0, device="cuda"), made_up("a", 4.0)):
        rows = page.with_row(rows, fresh)
    assert [(found["name"], found["machine"]["device"], found["wall"]["ours"]) for found in rows] == [
        *(("a", "cpu", 4.0), ("b", "cpu", 2.0), ("a", "cuda", 3.0)),
    ]


def test_a_place_takes_rows_by_their_first_word() -> None:
    rows = [made_up(name, 1.0) for name in ("meta_96", "meta_964", "latency_x", "latency_y", "agreement, tokens, float64")]
    text = page.table(rows, ["latency", "agreement", "meta_96"])
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [
        *("latency_x", "latency_y", "agreement, tokens, float64", "meta_96"),
    ]


@pytest.mark.parametrize("content", ["{", "{}", "[3]", '[{"name": "a"}]'])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json: "):
        page.read_rows(tmp_path / "rows.json")


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Page\n")
    with pytest.raises(UserError, match="has no place such as <!-- rows: name -->"):
        page.fill(tmp_path / "page.md", [])
