"""A training that is cut off anywhere and taken up again ends in the numbers of one that was not."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe import loop
from dmoe.artifacts import load_tensors, save_tensors
from dmoe.config import OptimizerConfig
from dmoe.errors import UserError
from dmoe.interruption import HEEDED, Interrupted, heed_signals
from dmoe.loop import Progress, Trainee
from dmoe.optimizers import ScheduledAdam
from dmoe.randomness import generator
from dmoe.run_folder import Stage

STEPS, EVALUATE_EVERY, CHECKPOINT_EVERY = 13, 4, 3
Describe = Callable[[int], str] | None


class CutOffError(Exception):
    """Stands for a process that ends here."""


class Training:
    """A small network, and a moment at which it is cut off.

    Args:
        cut: asked before each step with ``("step", number)`` and before each evaluation with ``("evaluate", steps done)``.
        scores: by steps done; left out, they come from the weights.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cut: Callable[[str, int], bool] = lambda what, number: False,
        scores: Mapping[int, float] | None = None,
        inputs: Mapping[str, object] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.stage = Stage(folder, inputs or {"seed": 1})
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        config = OptimizerConfig(lr=0.05, schedule="cosine", max_gradient_norm=1.0)
        self.adams = {
            name: ScheduledAdam(module.parameters(), config, steps=STEPS, steps_per_epoch=5)
            for name, module in (("body", self.body), ("head", self.head))
        }
        self.done, self.began, self.seen = 0, -1, {}
        self._cut, self._scores = cut, scores

    def step(self, number: int) -> dict[str, float]:
        if self._cut("step", number):
            raise CutOffError
        random = generator("data", number)
        inputs, labels = torch.randn(8, 4, generator=random), torch.randint(3, (8,), generator=random)
        loss = F.cross_entropy(self.head(self.body(inputs)), labels)
        loss.backward()
        for adam in self.adams.values():
            adam.step(number)
        self.done = number + 1
        self.seen[self.done] = self.weights()
        return {"loss": loss.item()}

    def evaluate(self) -> float:
        if self._cut("evaluate", self.done):
            raise CutOffError
        return self._scores[self.done] if self._scores else -self.head.weight.abs().sum().item()

    def start(self, number: int) -> None:
        self.began = number

    def weights(self) -> dict[str, Tensor]:
        trainee = Trainee(modules={"body": self.body, "head": self.head}, optimizers=self.adams)
        return {name: tensor.clone() for name, tensor in trainee.weights().items()}

    def run(self, *, evaluate: bool = True, checkpoint_every: int = CHECKPOINT_EVERY, describe: Describe = None) -> Progress:
        return loop.run(
            stage=self.stage,
            trainee=Trainee(modules={"body": self.body, "head": self.head}, optimizers=self.adams),
            step=self.step,
            steps=STEPS,
            start=self.start,
            evaluate=self.evaluate if evaluate else None,
            evaluate_every=EVALUATE_EVERY,
            checkpoint_every=checkpoint_every,
            describe=describe,
        )


@pytest.fixture
def heeding() -> Iterator[None]:
    """Signals are treated as in the entry points."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HEEDED}
    heed_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Weights and scores of a training that nothing happened to."""
    training = Training(tmp_path_factory.mktemp("undisturbed"))
    progress = training.run()
    return load_tensors(training.stage.weights)[0], progress.scores


def cut_off(folder: Path, what: str, number: int) -> None:
    with pytest.raises(CutOffError):
        Training(folder, cut=lambda *moment: moment == (what, number)).run()


@pytest.mark.parametrize("number", range(STEPS))
def test_cut_off_before_any_step_and_resumed_is_bit_equal(tmp_path: Path, undisturbed: tuple, number: int) -> None:
    cut_off(tmp_path, "step", number)
    training = Training(tmp_path)
    progress = training.run()
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]


@pytest.mark.parametrize("done", [4, 8, 12, 13])
def test_cut_off_in_an_evaluation_and_resumed_is_bit_equal(tmp_path: Path, undisturbed: tuple, done: int) -> None:
    cut_off(tmp_path, "evaluate", done)
    training = Training(tmp_path)
    progress = training.run()
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]


@pytest.mark.parametrize("file", ["best.safetensors", "checkpoint.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_cut_off_around_the_writing_of_any_file_and_resumed_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple, file: str, nth: int, moment: str
) -> None:
    written: list[str] = []

    def save(path: Path, *content: Mapping, keep: Path | None = None) -> None:
        written.append(path.name)
        here = path.name == file and written.count(file) == nth + 1
        if here and moment == "before":
            raise CutOffError
        save_tensors(path, *content, keep=keep)
        if here:
            raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_tensors", save)
        try:
            Training(tmp_path).run()
        except CutOffError:
            pass
        else:
            assert written.count(file) <= nth  # so often it is not written at all
    training = Training(tmp_path)
    progress = training.run()
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]


def test_cut_off_many_times_and_resumed_is_bit_equal(tmp_path: Path, undisturbed: tuple) -> None:
    for what, number in (("step", 1), ("step", 5), ("evaluate", 8), ("step", 10), ("evaluate", 13)):
        cut_off(tmp_path, what, number)
    training = Training(tmp_path)
    progress = training.run()
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]


def test_resumed_training_begins_at_the_last_checkpoint(tmp_path: Path) -> None:
    cut_off(tmp_path, "step", 11)
    training = Training(tmp_path)
    training.run()
    assert training.began == 9
    assert min(training.seen) == 10


def test_checkpoint_lies_at_its_interval_and_at_each_evaluation(tmp_path: Path) -> None:
    for number, expected in ((2, None), (3, 3), (4, 4), (5, 4), (7, 6), (9, 9)):
        folder = tmp_path / str(number)
        cut_off(folder, "step", number)
        path = folder / "checkpoint.safetensors"
        found = load_tensors(path)[1]["progress"]["step"] if path.exists() else None
        assert found == expected


def test_best_weights_are_kept_and_not_the_last(tmp_path: Path) -> None:
    training = Training(tmp_path, scores={4: 0.1, 8: 0.9, 12: 0.5, 13: 0.6})
    progress = training.run()
    assert (progress.best_step, progress.best_score) == (8, 0.9)
    assert_equal(load_tensors(training.stage.weights)[0], training.seen[8])


def test_modules_end_with_the_weights_that_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, scores={4: 0.9, 8: 0.1, 12: 0.5, 13: 0.6})
    training.run()
    assert_equal(training.weights(), load_tensors(training.stage.weights)[0])


def test_first_of_equal_scores_is_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, scores={4: 0.2, 8: 0.5, 12: 0.5, 13: 0.5})
    assert training.run().best_step == 8


def test_best_weights_from_before_the_cut_are_remembered(tmp_path: Path) -> None:
    scores = {4: 0.9, 8: 0.1, 12: 0.2, 13: 0.3}
    with pytest.raises(CutOffError):
        Training(tmp_path, cut=lambda *moment: moment == ("step", 10), scores=scores).run()
    training = Training(tmp_path, scores=scores)
    progress = training.run()
    assert progress.best_step == 4
    whole = Training(tmp_path / "whole", scores=scores)
    whole.run()
    assert_equal(load_tensors(training.stage.weights)[0], whole.seen[4])


def test_without_evaluation_the_last_weights_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path)
    progress = training.run(evaluate=False)
    assert progress.scores == []
    assert_equal(load_tensors(training.stage.weights)[0], training.seen[STEPS])


def test_there_is_an_evaluation_at_its_interval_and_after_the_last_step(tmp_path: Path) -> None:
    assert [done for done, _ in Training(tmp_path).run().scores] == [4, 8, 12, 13]


def test_checkpoint_made_from_other_inputs_is_refused(tmp_path: Path) -> None:
    cut_off(tmp_path, "step", 5)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError) as caught:
        Training(tmp_path, inputs={"seed": 2}).run()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'checkpoint.safetensors'}: made from other inputs, seed: 1 there, 2 here")
    assert "\n" not in message
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_last_bit])
def test_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, undisturbed: tuple, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    cut_off(tmp_path, "step", 11)
    damage(tmp_path / "checkpoint.safetensors")
    training = Training(tmp_path)
    progress = training.run()
    assert training.began == 8  # the checkpoint of the evaluation before
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("going on from checkpoint.previous.safetensors")
    assert len(told) == 2 and told[1].endswith("going on after step 8 of 13")


@pytest.mark.parametrize(
    ("damage", "why"), [(cut, "not a whole safetensors file"), (flip_last_bit, "changed since it was written")]
)
def test_two_damaged_checkpoints_are_told_in_one_line(tmp_path: Path, damage: Callable[[Path], None], why: str) -> None:
    cut_off(tmp_path, "step", 11)
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        damage(tmp_path / name)
    with pytest.raises(UserError) as caught:
        Training(tmp_path).run()
    assert str(caught.value).startswith(f"{tmp_path / 'checkpoint.previous.safetensors'}: {why}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("facts", [{}, {"inputs": {"seed": 1}}, {"inputs": {"seed": 1}, "progress": {"stop": 3}}, {"progress": 1}])
def test_weights_that_are_no_checkpoint_are_told_in_one_line(tmp_path: Path, facts: dict) -> None:
    save_tensors(tmp_path / "checkpoint.safetensors", Training(tmp_path).weights(), facts)
    with pytest.raises(UserError, match="no checkpoint of a training") as caught:
        Training(tmp_path).run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [0, 3, 6, STEPS - 1])
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_a_step_ends_after_a_checkpoint_of_it(
    tmp_path: Path, undisturbed: tuple, heeding: None, number: int, which: signal.Signals
) -> None:
    def interrupt(what: str, at: int) -> bool:
        if (what, at) == ("step", number):
            os.kill(os.getpid(), which)
        return False

    with pytest.raises(Interrupted) as caught:
        Training(tmp_path, cut=interrupt).run()
    assert caught.value.status == 128 + which
    training = Training(tmp_path)
    progress = training.run()
    assert training.began == number + 1
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]


def test_signal_in_an_evaluation_ends_it_at_once_and_no_step_is_lost(tmp_path: Path, undisturbed: tuple, heeding: None) -> None:
    def interrupt(what: str, at: int) -> bool:
        if (what, at) == ("evaluate", 8):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation goes on")
        return False

    with pytest.raises(Interrupted):
        Training(tmp_path, cut=interrupt).run()
    training = Training(tmp_path)
    assert training.run().scores == undisturbed[1]
    assert training.began == 8
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])


class Stumbling(Training):
    """Some of its steps find no finite numbers."""

    bad: range

    def step(self, number: int) -> dict[str, float]:
        if number in self.bad:
            self.done = number + 1
            return {"loss": math.nan, "skipped": 1.0}
        return super().step(number)

    def run(self, *, evaluate: bool = False, checkpoint_every: int = 1, describe: Describe = None) -> Progress:
        describe = describe or (lambda number: f"domain 3: image {number}")
        return super().run(evaluate=evaluate, checkpoint_every=checkpoint_every, describe=describe)


def test_skipped_steps_are_counted_and_the_first_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Stumbling.bad = range(3, 7)
    progress = Stumbling(tmp_path).run()
    assert (progress.skipped, progress.skipped_in_a_row) == (4, 0)
    assert "4 of them skipped" in progress.summary()
    assert [line for line in capsys.readouterr().out.splitlines() if "loss nan in step 3" in line]


def test_many_skipped_steps_in_a_row_end_the_training_also_across_a_cut(tmp_path: Path) -> None:
    Stumbling.bad = range(3, 9)
    with pytest.raises(CutOffError):
        training = Stumbling(tmp_path)
        step = training.step

        def cut(number: int) -> dict[str, float]:
            if number == 5:
                raise CutOffError
            return step(number)

        training.step = cut  # type: ignore[method-assign]
        training.run()
    with pytest.raises(UserError, match=r"loss nan in step 7 \(domain 3: image 7\)") as caught:
        Stumbling(tmp_path).run()
    assert "\n" not in str(caught.value)


def test_time_of_all_visits_is_counted(tmp_path: Path) -> None:
    cut_off(tmp_path, "step", 5)
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = load_tensors(path)
    facts["progress"]["seconds"] = 1000.0
    save_tensors(path, tensors, facts)
    assert 1000.0 < Training(tmp_path).run().seconds < 1100.0


def test_tidy_leaves_the_weights_alone(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run()
    loop.tidy(training.stage)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["weights.safetensors"]


@pytest.mark.parametrize("what", [("step", 3), ("step", 6), ("evaluate", 8), ("evaluate", 13)])
def test_full_disk_is_told_and_with_room_again_the_training_ends_as_if_nothing_had_been(
    small_disk: Path, undisturbed: tuple, what: tuple[str, int]
) -> None:
    filler = small_disk / "filler"

    def fill(*moment: object) -> bool:
        if moment == what:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * 512)
        return False

    with pytest.raises(UserError) as caught:
        Training(small_disk / "stage", cut=fill).run()
    assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
    filler.unlink()
    training = Training(small_disk / "stage")
    progress = training.run()
    assert_equal(load_tensors(training.stage.weights)[0], undisturbed[0])
    assert progress.scores == undisturbed[1]
