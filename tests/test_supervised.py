"""The supervised loop: what it computes, and that being cut off does not change it, dropout included."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.artifacts import load_tensors
from dmoe.config import Duration, TrainingConfig
from dmoe.data.streams import EpochOrder
from dmoe.loop import Progress
from dmoe.run_folder import Stage
from dmoe.supervised import task_loss, train_supervised
from dmoe.tasks import Task

RANDOM = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(40, 5, generator=RANDOM), torch.randint(3, (40,), generator=RANDOM)
ORDER = EpochOrder(40, 8, 1)
TRAINING = TrainingConfig.model_validate(
    {
        "batch_size": 8,
        "duration": "3 epochs",
        "evaluate_every": "4 steps",
        "optimizer": {"lr": 0.02, "l2": 0.01, "schedule": "exponential", "warmup": "4 steps"},
    }
)

CONSTANT = TrainingConfig.model_validate({"batch_size": 8, "duration": "15 steps", "optimizer": {"lr": 0.02}})


class CutOffError(Exception):
    """Stands for a process that ends here."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    index = ORDER[step]
    return INPUTS[index], LABELS[index]


def network(dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def train(
    folder: Path,
    module: nn.Module,
    *,
    cut_before: int = -1,
    seed: int = 1,
    training: TrainingConfig = TRAINING,
    scored: bool = True,
    objective: "Prior | None" = None,
    restart_at: int | None = None,
) -> tuple[Progress, dict[str, Tensor]]:
    passes = iter(range(1000))

    def logits(inputs: Tensor) -> Tensor:
        if module.training and next(passes) == cut_before:
            raise CutOffError
        return module(inputs)

    def evaluate() -> float:
        with torch.no_grad():
            return -F.cross_entropy(module(INPUTS), LABELS).item()

    of_task = task_loss(logits, Task("multiclass", num_outputs=3), precision=training.precision, device=torch.device("cpu"))

    def loss(step: int, inputs: Tensor, labels: Tensor) -> Tensor:
        found = of_task(step, inputs, labels)
        return found if objective is None else objective(found)

    stage = Stage(folder, {"seed": seed})
    progress = train_supervised(
        stage=stage,
        module=module,
        loss=loss,
        batch=batch,
        steps_per_epoch=ORDER.steps_per_epoch,
        training=training,
        evaluate=evaluate if scored else None,
        checkpoint_every=3,
        seed=seed,
        device=torch.device("cpu"),
        objective=objective,
        restart_at=restart_at,
    )
    return progress, load_tensors(stage.weights)[0]


class Prior(nn.Module):
    """An objective that learns a factor, and remembers the mean of the losses so far."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("remembered", torch.tensor(0.0))

    def forward(self, loss: Tensor) -> Tensor:
        self.remembered.mul_(0.9).add_(0.1 * loss.detach())
        return loss * self.factor.exp() - self.remembered * self.factor


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [0, 2, 3, 7, 8, 13, 14])
def test_cut_off_and_resumed_with_dropout_is_bit_equal(tmp_path: Path, step: int) -> None:
    progress, weights = train(tmp_path / "undisturbed", network())
    with pytest.raises(CutOffError):
        train(tmp_path / "cut", network(), cut_before=step)
    torch.manual_seed(12345)  # another process has another global random state
    resumed_progress, resumed = train(tmp_path / "cut", network())
    assert equal(resumed, weights)
    assert resumed_progress.scores == progress.scores


@pytest.mark.parametrize("step", [2, 3, 7, 8])
def test_an_objective_with_weights_and_state_is_trained_kept_and_resumed(tmp_path: Path, step: int) -> None:
    _, weights = train(tmp_path / "undisturbed", network(), objective=Prior(), scored=False)
    assert weights["objective.factor"] != 1 and weights["objective.remembered"] != 0
    with pytest.raises(CutOffError):
        train(tmp_path / "cut", network(), cut_before=step, objective=Prior(), scored=False)
    assert equal(train(tmp_path / "cut", network(), objective=Prior(), scored=False)[1], weights)


@pytest.mark.parametrize("step", [7, 8, 11])
def test_cut_off_near_a_restart_of_the_optimizer_and_resumed_is_bit_equal(tmp_path: Path, step: int) -> None:
    _, weights = train(tmp_path / "undisturbed", network(), restart_at=8)
    with pytest.raises(CutOffError):
        train(tmp_path / "cut", network(), cut_before=step, restart_at=8)
    assert equal(train(tmp_path / "cut", network(), restart_at=8)[1], weights)


def test_after_a_restart_the_optimizer_knows_nothing_of_the_gradients_before(tmp_path: Path) -> None:
    module = network(dropout=0.0)
    module.train()
    for steps in (range(6), range(6, 15)):
        adam = torch.optim.Adam(module.parameters(), lr=0.02, fused=True)
        for step in steps:
            inputs, labels = batch(step)
            adam.zero_grad()
            F.cross_entropy(module(inputs), labels).backward()
            adam.step()
    _, weights = train(tmp_path, network(dropout=0.0), training=CONSTANT, scored=False, restart_at=6)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(weights[f"model.{name}"], tensor, rtol=1e-5, atol=1e-7)


def test_dropout_is_on_in_training_and_depends_on_the_seed(tmp_path: Path) -> None:
    weights = [train(tmp_path / str(seed), network(), seed=seed, scored=False)[1] for seed in (1, 2)]
    assert not equal(*weights)


def test_without_dropout_the_seed_does_not_matter(tmp_path: Path) -> None:
    weights = [train(tmp_path / str(seed), network(dropout=0.0), seed=seed)[1] for seed in (1, 2)]
    assert equal(*weights)


def test_training_is_adam_on_the_task_loss_by_the_schedule(tmp_path: Path) -> None:
    module = network(dropout=0.0)
    module.train()
    adam = torch.optim.Adam(module.parameters(), lr=0.02, weight_decay=0.01, fused=True)
    for step in range(15):
        adam.param_groups[0]["lr"] = 0.02 * min(1.0, (step + 1) / 4) * 0.96 ** (step // 5)
        inputs, labels = batch(step)
        adam.zero_grad()
        F.cross_entropy(module(inputs), labels).backward()
        adam.step()
    _, weights = train(tmp_path, network(dropout=0.0), scored=False)
    assert weights.keys() == {f"model.{name}" for name in module.state_dict()}
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(weights[f"model.{name}"], tensor, rtol=1e-5, atol=1e-7)


def test_duration_in_epochs_is_so_many_passes_over_the_images(tmp_path: Path) -> None:
    progress, _ = train(tmp_path, network())
    assert progress.step == 15
    assert [step for step, _ in progress.scores] == [4, 8, 12, 15]


def test_module_ends_in_eval_mode_with_the_best_weights(tmp_path: Path) -> None:
    module = network()
    progress, weights = train(tmp_path, module)
    assert not module.training
    assert equal({f"model.{name}": tensor for name, tensor in module.state_dict().items()}, weights)
    with torch.no_grad():
        assert -F.cross_entropy(module(INPUTS), LABELS).item() == pytest.approx(progress.best_score)
    assert progress.best_score == max(score for _, score in progress.scores)


def test_evaluating_leaves_the_trained_weights_as_they_are(tmp_path: Path) -> None:
    often = TRAINING.model_copy(update={"evaluate_every": TRAINING.evaluate_every.parse("1 step")})
    _, weights = train(tmp_path / "never", network(), scored=False)
    module = network()
    progress, best = train(tmp_path / "often", module, training=often)
    last_is_best = progress.best_step == 15
    assert last_is_best == equal(best, weights)
    checkpoint = load_tensors(tmp_path / "often" / "checkpoint.safetensors")[0]
    assert all(torch.equal(checkpoint[name], weights[name]) for name in weights)


def test_parameter_without_gradient_is_left_alone(tmp_path: Path) -> None:
    module = network()
    module.unused = nn.Linear(2, 2)
    module.forward = nn.Sequential(*list(module)[:5]).forward  # type: ignore[method-assign]
    before = module.unused.weight.detach().clone()
    train(tmp_path, module)
    assert torch.equal(module.unused.weight, before)


def test_bfloat16_trains_float32_weights_a_little_differently(tmp_path: Path) -> None:
    coarse = TRAINING.model_copy(update={"precision": "bfloat16"})
    found = [train(tmp_path / name, network(0.0), training=how, scored=False)[1] for name, how in (("f", TRAINING), ("b", coarse))]
    assert all(tensor.dtype == found[0][name].dtype for name, tensor in found[1].items())
    assert not equal(*found)
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0.2, atol=0.1)


def test_a_batch_without_finite_numbers_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is that of the other steps alone, batch-norm statistics included."""
    spoiled = {2, 3, 9}
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.batch", lambda step: (INPUTS[:8] * (math.nan if step in spoiled else 1.0), LABELS[:8]))
        progress, found = train(tmp_path / "spoiled", network(dropout=0.0), training=CONSTANT, scored=False)
        assert progress.skipped == 3
        spoiled.clear()
        short = CONSTANT.model_copy(update={"duration": Duration(12, "steps")})
        _, expected = train(tmp_path / "short", network(dropout=0.0), training=short, scored=False)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
