"""What the choice between ways to the gradient goes by, and what is remembered of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmoe.errors import UserError
from dmoe.meta import choice
from dmoe.meta.choice import Choice, choose, remember, remembered
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network, build_network
from dmoe.tasks import Task

TASK = Task("multiclass", num_outputs=3)


def learner_of(student: Network) -> MetaLearner:
    aggregator = Aggregator(width=student.width, num_outputs=3, depth=1, heads=4, dropout=0.1)
    return MetaLearner(student=student, aggregator=aggregator, task=TASK, inner_lr=0.1)


def episode_for(student: Network, *, support: int = 8, query: int = 6, size: int = 16) -> EpisodeBatch:
    tokens = torch.randn(support, 2, student.width)
    return EpisodeBatch(
        torch.randn(support, 3, size, size), tokens, torch.randn(query, 3, size, size), torch.zeros(query, dtype=torch.int64)
    )


@pytest.fixture
def student() -> Network:
    return build_network("small_conv", image_shape=(3, 16, 16), num_outputs=3)


class Clock:
    """Seconds that a trial takes, by its way: instead of a real clock, which is noisy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[Way, float]) -> None:
        def timed(trial: choice._Trial, count: int, memory: int) -> Choice:
            trial._run(count)
            return Choice(trial.way, memory / 1e9, seconds.get(trial.way, 1.0))

        monkeypatch.setattr(choice._Trial, "timed", timed)


def test_where_everything_fits_and_nothing_is_clearly_faster_the_simplest_way_is_taken(
    student: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, {Way("forward_over_reverse", 4): 0.95})
    assert choose(learner_of(student), episode_for(student), budget=10**9).way == Way("double_backward")


def test_a_clearly_faster_chunk_is_taken(student: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, {Way("forward_over_reverse", 4): 0.5})
    assert choose(learner_of(student), episode_for(student), budget=10**9).way == Way("forward_over_reverse", 4)


def test_with_little_memory_chunks_are_what_fits(student: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episode = learner_of(student), episode_for(student, support=64, query=32)
    fixed, each = choice._Trial(learner, Way("forward_over_reverse"), episode).memory(1)
    budget = int(fixed + 5.5 * each)
    Clock(monkeypatch, {Way("forward_over_reverse", size): 10 / size for size in range(1, 65)})
    found = choose(learner, episode, budget=budget)
    assert found.way == Way("forward_over_reverse", 5)
    assert found.gigabytes <= budget / 1e9


def test_chunks_are_no_larger_than_it_pays(student: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(
        monkeypatch,
        {Way("forward_over_reverse", 4): 0.5, Way("forward_over_reverse", 8): 0.3, Way("forward_over_reverse", 16): 0.29},
    )
    learner, episode = learner_of(student), episode_for(student, support=64, query=32)
    assert choose(learner, episode, budget=10**9).way == Way("forward_over_reverse", 8)


def test_memory_of_many_images_is_foretold_from_a_few(student: Network) -> None:
    learner, episode = learner_of(student), episode_for(student, support=32, query=32)
    for way in (Way("double_backward"), Way("forward_over_reverse")):
        trial = choice._Trial(learner, way, episode)
        fixed, each = trial.memory(10**9)
        assert trial._peak(32) <= fixed + 32 * each <= 1.3 * trial._peak(32)


def test_with_slow_images_what_fits_as_a_whole_is_taken_untimed(student: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "PATIENCE", 0.0)
    Clock(monkeypatch, {Way("forward_over_reverse", 4): 0.0})
    found = choose(learner_of(student), episode_for(student), budget=10**9)
    assert (found.way, found.seconds) == (Way("double_backward"), 0.0)


def test_no_memory_for_one_image_is_told(student: Network) -> None:
    with pytest.raises(UserError, match=r"^meta.memory_gb: one image at a time takes \d+\.\d+ GB, there are 0\.00"):
        choose(learner_of(student), episode_for(student), budget=1000)


def test_a_choice_leaves_the_learner_as_it_was(student: Network) -> None:
    learner = learner_of(student)
    learner.way = Way("reverse_over_reverse", 3)
    before = [p.detach().clone() for p in (*learner.student_parameters, *learner.aggregator_parameters)]
    choose(learner, episode_for(student), budget=10**9)
    after = [*learner.student_parameters, *learner.aggregator_parameters]
    assert learner.way == Way("reverse_over_reverse", 3)
    assert all(torch.equal(p, value) and p.grad is None for p, value in zip(after, before, strict=True))


class NoForwardMode(torch.autograd.Function):
    """Doubles, and can be differentiated backwards only."""

    @staticmethod
    def forward(images: Tensor) -> Tensor:
        return 2 * images

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = NoForwardMode.apply(features)
        return found


def test_a_student_without_forward_mode_is_differentiated_in_reverse(student: Network) -> None:
    one = Network(features=nn.Sequential(student.features, Doubled()), head=student.head)
    learner, episode = learner_of(one), episode_for(one, support=64, query=32)
    whole = choice._Trial(learner, Way("double_backward"), episode).memory(10**9)
    found = choose(learner, episode, budget=whole[0] + 20 * whole[1])
    assert found.way.method == "reverse_over_reverse"


def test_a_student_that_cannot_be_differentiated_twice_is_told() -> None:
    one = build_network("timm:mobilenetv3_small_050", image_shape=(3, 32, 32), num_outputs=3)
    with pytest.raises(UserError, match=r"^student.backbone: it cannot be differentiated twice"):
        choose(learner_of(one), episode_for(one, support=4, query=2, size=32), budget=10**9)


def test_what_was_chosen_is_remembered_for_the_same_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = Choice(Way("forward_over_reverse", 4), 1.5, 0.25)
    remember({"images": [3, 16, 16]}, chosen)
    assert remembered({"images": [3, 16, 16]}) == chosen
    assert remembered({"images": [3, 32, 32]}) is None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert remembered({"images": [3, 16, 16]}) is None
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("content", ["", "{}", '{"way": 1, "gigabytes": 1, "seconds": 1}', "[1]"])
def test_a_damaged_note_counts_as_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember({}, Choice(Way()))
    (note,) = (tmp_path / "dmoe" / "gradients").iterdir()
    note.write_text(content)
    assert remembered({}) is None


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dmoe").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember({}, Choice(Way()))
    assert remembered({}) is None


def test_a_choice_survives_its_facts() -> None:
    chosen = Choice(Way("double_backward"), 2.0, 3.0)
    assert Choice.from_facts({"way": {"method": "double_backward", "chunk_size": None}, "gigabytes": 2.0, "seconds": 3.0}) == chosen
    assert str(replace(chosen, way=Way("forward_over_reverse", 4))) == "forward over reverse, 4 images at a time, about 2.0 GB"
