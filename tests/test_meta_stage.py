"""How a run comes by its way to the meta-gradient."""

from dataclasses import asdict
from pathlib import Path

import pytest
from noise import run_in

from dmoe import meta_stage
from dmoe.artifacts import write_json
from dmoe.errors import UserError
from dmoe.meta.choice import Choice
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
from dmoe.meta_stage import GRADIENT_FILE, gradient_way, meta_learner
from dmoe.model import build_aggregator
from dmoe.stages import Run

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
