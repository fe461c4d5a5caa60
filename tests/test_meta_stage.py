"""How a run comes by its way to the meta-gradient."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from noise import run_in, steady_run_in, train
from torch import Tensor

import dmoe
from dmoe import meta_stage, stages
from dmoe.artifacts import load_tensors, read_json, under_prefix, write_json
from dmoe.errors import UserError
from dmoe.meta.choice import Choice
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way, ZeroTarget
from dmoe.meta_stage import GRADIENT_FILE, gradient_way, meta_learner
from dmoe.model import build_aggregator
from dmoe.run import Run
from dmoe.run_folder import RunFolder

FOUND = Choice(Way("forward_over_reverse", 4), 1.0, 2.0)


def learner_of(run: Run) -> MetaLearner:
    student = run.network(run.config.student_backbone, "student", to_train=False)
    aggregator = build_aggregator(run.config.aggregator, width=student.width, num_outputs=run.dataset.task.num_outputs)
    return meta_learner(run, aggregator, student)


def way_of(run: Run) -> Choice:
    return gradient_way(run, learner_of(run))


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Those that something is chosen for, while the choice takes no time and nothing is remembered yet."""
    asked: list[int] = []

    def choose(learner: MetaLearner, episode: EpisodeBatch, *, budget: int) -> Choice:
        asked.append(budget)
        return FOUND

    monkeypatch.setattr(meta_stage, "choose", choose)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


@pytest.mark.parametrize(
    ("overrides", "way"),
    [
        (["meta.gradient=double_backward"], Way("double_backward")),
        (["meta.gradient=reverse_over_reverse", "meta.chunk_size=3"], Way("reverse_over_reverse", 3)),
        (["meta.gradient=auto", "meta.chunk_size=3"], Way("forward_over_reverse", 3)),
    ],
)
def test_what_is_configured_is_taken(tmp_path: Path, budgets: list[int], overrides: list[str], way: Way) -> None:
    assert way_of(run_in(tmp_path / "run", *overrides)).way == way
    assert budgets == []


def test_a_choice_is_made_once_on_a_machine(tmp_path: Path, budgets: list[int]) -> None:
    for name in ("one", "other"):
        assert way_of(run_in(tmp_path / name, "meta.gradient=auto", "meta.memory_gb=2.5")) == FOUND
    assert budgets == [2_500_000_000]


@pytest.mark.parametrize("other", ["meta.memory_gb=3", "meta.support_size=9", "meta.inner_steps=2", "aggregator.depth=2"])
def test_another_size_is_another_choice(tmp_path: Path, budgets: list[int], other: str) -> None:
    way_of(run_in(tmp_path / "one", "meta.gradient=auto"))
    way_of(run_in(tmp_path / "other", "meta.gradient=auto", other))
    assert len(budgets) == 2


@pytest.mark.parametrize(("memory", "way"), [("null", Way("double_backward")), ("2", FOUND.way)])
def test_a_run_goes_on_as_it_began_unless_it_is_given_other_memory(
    tmp_path: Path, budgets: list[int], memory: str, way: Way
) -> None:
    begun = {**asdict(Choice(Way("double_backward"), 0.5, 0.5)), "memory_gb": None}
    write_json(tmp_path / "run" / "meta" / GRADIENT_FILE, begun)
    assert way_of(run_in(tmp_path / "run", "meta.gradient=auto", f"meta.memory_gb={memory}")).way == way


@pytest.mark.parametrize("content", ["{}", '{"memory_gb": null, "way": 3}', '{"memory_gb": null, "way": {"speed": 1}}'])
def test_a_damaged_note_of_how_it_began_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run" / "meta" / GRADIENT_FILE
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"gradient.json: damaged .*: delete it to choose again$"):
        way_of(run_in(tmp_path / "run", "meta.gradient=auto"))


def test_by_itself_a_way_is_found_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = run_in(tmp_path / "run", "meta.gradient=auto")
    learner = learner_of(run)
    chosen = gradient_way(run, learner)
    assert chosen.seconds > 0 and chosen.gigabytes > 0
    assert gradient_way(run, learner) == chosen


STEADY = ["meta.gradient=double_backward", "meta.inner_lr=0.05", "meta.support_size=8"]
OLD_META_FIELDS = {
    *("duration", "domains_per_update", "support_size", "query_size", "inner_lr", "inner_steps", "inner_loss", "mask", "target"),
    *("student", "aggregator", "restart_optimizers", "gradient", "chunk_size", "precision", "evaluate_every"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "run"
    train(steady_run_in(folder, *STEADY))
    return folder


def trained_otherwise(trained: Path, folder: Path, *overrides: str) -> Run:
    """The run with other settings of meta-training, from the same experts, aggregator and student."""
    for part in ("experts", "tokens", "aggregator", "student"):
        shutil.copytree(trained / part, folder / part)
    run = steady_run_in(folder, *STEADY, *overrides)
    RunFolder(folder / "config").claim(run.config)
    (folder / "config" / "config.yaml").rename(folder / "config.yaml")
    if "aggregator" in "".join(overrides).split("=")[0]:
        shutil.rmtree(folder / "aggregator")
    train(run)
    return run


def tensors_of(folder: Path, stage: str, prefix: str) -> dict[str, Tensor]:
    return under_prefix(prefix, load_tensors(folder / stage / "weights.safetensors")[0])


def changed(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """First words of the names of tensors that differ."""
    assert one.keys() == other.keys()
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize(
    ("overrides", "aggregator", "student"),
    [
        ([], {"blocks", "output_map"}, {"features", "head"}),
        (["meta.distill=logits"], {"blocks", "head", "output_map"}, {"features", "head"}),  # the map is fitted, and learns no more
        (["meta.distill=both"], {"blocks", "head", "output_map"}, {"features", "head"}),
        (["meta.learns=student"], {"output_map"}, {"features", "head"}),
        (["meta.learns=aggregator"], {"blocks", "output_map"}, set()),
        (["meta.duration=0 steps"], {"output_map"}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_what_a_setting_lets_learn_has_learned_when_the_run_ends(
    trained: Path, tmp_path: Path, overrides: list[str], aggregator: set[str], student: set[str]
) -> None:
    folder = tmp_path / "run"
    run = trained_otherwise(trained, folder, *overrides, "meta.evaluate_every=0 steps")
    assert read_json(folder / "meta" / "manifest.json")["figures"]["scores"], "it was looked at"
    if read_json(folder / "meta" / "manifest.json")["figures"]["best_step"] > 0 or not student:
        assert changed(tensors_of(folder, "meta", "student"), tensors_of(folder, "student", "model")) == student
        assert changed(tensors_of(folder, "meta", "aggregator"), tensors_of(folder, "aggregator", "model")) == aggregator
    model = dmoe.load(folder)
    images = run.dataset.splits["target"].images(torch.arange(8))
    adapted = model.adapt(images)
    assert (adapted.logits(images) - model.student.logits(images)).abs().max() > 0
    learned = model.student.features.state_dict()
    assert not changed(learned, tensors_of(folder, "meta", "student.features"))


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_run_with_another_pooling_ends_and_loads(trained: Path, tmp_path: Path, pooling: str) -> None:
    run = trained_otherwise(trained, tmp_path / "run", f"aggregator.pooling={pooling}", "aggregator.output_map=false")
    model, images = dmoe.load(run.folder.path), run.dataset.splits["target"].images(torch.arange(8))
    told = torch.stack([stages.load_experts(run)[number].features(images) for number in range(2)], dim=1)
    expected = told.amax(dim=1) if pooling == "max" else told.mean(dim=1)
    torch.testing.assert_close(model.target(images), expected)


def test_a_random_start_owes_nothing_to_the_pretrained_student(trained: Path, tmp_path: Path) -> None:
    def student_of(name: str, seed: int) -> dict[str, Tensor]:
        run = steady_run_in(tmp_path / name, *STEADY, "meta.student_start=random", "meta.duration=0 steps", f"seed={seed}")
        train(run)
        return tensors_of(run.folder.path, "meta", "student")

    one, again, other = student_of("one", 1), student_of("again", 1), student_of("other", 2)
    assert not changed(one, again)
    assert changed(one, other)
    assert changed(one, tensors_of(tmp_path / "one", "student", "model")) == {"features", "head"}
    assert all(not value.any() for name, value in one.items() if name.endswith("running_mean")), "no image has been seen"


def test_defaults_leave_the_inputs_of_stages_as_they_were(trained: Path) -> None:
    """A run that was made before there were these settings stays finished."""
    inputs = {name: read_json(trained / name / "manifest.json")["inputs"] for name in ("aggregator", "meta")}
    old_aggregator = {"depth", "heads", "dropout", "output_map", "training"}
    assert set(inputs["aggregator"]["aggregator"]) == set(inputs["meta"]["aggregator"]) == old_aggregator
    assert set(inputs["meta"]["meta"]) == OLD_META_FIELDS


@pytest.mark.parametrize("overrides", [["aggregator.pooling=max", "aggregator.output_map=false"], ["meta.target=zeros"]])
def test_an_aggregator_without_parameters_cannot_be_all_that_learns(tmp_path: Path, overrides: list[str]) -> None:
    run = run_in(tmp_path / "run", *overrides, "meta.learns=aggregator")
    student = run.network(run.config.student_backbone, "student", to_train=False)
    aggregator = build_aggregator(run.config.aggregator, width=student.width, num_outputs=3)
    teacher = ZeroTarget() if run.config.meta.target == "zeros" else aggregator
    with pytest.raises(UserError, match=r"^meta.learns: aggregator: this one has no parameters to learn: take both or student$"):
        meta_learner(run, teacher, student)
