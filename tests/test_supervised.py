"""The supervised loop: what it computes, and that being cut off does not change it, dropout included."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.artifacts import load_tensors
from dmoe.config import Duration, TrainingConfig
from dmoe.data.streams import EpochOrder
from dmoe.loop import Progress
from dmoe.objectives import SWAD, Fish, Gradient, gradient_of_loss
from dmoe.run_folder import Stage
from dmoe.supervised import task_loss, train_supervised
from dmoe.tasks import Task

RANDOM = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(40, 5, generator=RANDOM), torch.randint(3, (40,), generator=RANDOM)
ORDER = EpochOrder(40, 8, 1)
CLASSES = Task("multiclass", num_outputs=3)
FISH = Fish(CLASSES, inner_lr=0.1)
DOMAINS = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0])
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


def batch_of_domains(step: int) -> tuple[Tensor, Tensor, Tensor]:
    return *batch(step), DOMAINS


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
    gradient: Gradient = gradient_of_loss,
    average: SWAD | None = None,
    batches: Callable[[int], tuple[Tensor, ...]] | None = None,
) -> tuple[Progress, dict[str, Tensor]]:
    passes = iter(range(1000))

    def logits(inputs: Tensor) -> Tensor:
        if module.training and next(passes) == cut_before:
            raise CutOffError
        return module(inputs)

    def evaluate() -> float:
        with torch.no_grad():
            value = F.cross_entropy(module(INPUTS), LABELS).item()
        if average is not None:
            average.evaluated(module, value)
        return -value

    of_task = task_loss(logits, CLASSES, precision=training.precision, device=torch.device("cpu"))

    def loss(step: int, inputs: Tensor, labels: Tensor, *domains: Tensor) -> Tensor:
        found = of_task(step, inputs, labels)
        return found if objective is None else objective(found)

    stage = Stage(folder, {"seed": seed})
    progress = train_supervised(
        stage=stage,
        module=module,
        loss=loss,
        batch=batches or batch,
        steps_per_epoch=ORDER.steps_per_epoch,
        training=training,
        evaluate=evaluate if scored else None,
        checkpoint_every=3,
        seed=seed,
        device=torch.device("cpu"),
        objective=objective,
        restart_at=restart_at,
        gradient=gradient,
        average=average,
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


@pytest.mark.parametrize("step", [1, 5, 6, 16, 17, 29])
def test_cut_off_between_the_domains_of_a_step_and_resumed_is_bit_equal(tmp_path: Path, step: int) -> None:
    """There are two passes in a step."""

    def fish(folder: Path, cut_before: int = -1) -> dict[str, Tensor]:
        return train(folder, network(), cut_before=cut_before, gradient=FISH.gradient, batches=batch_of_domains)[1]

    weights = fish(tmp_path / "undisturbed")
    with pytest.raises(CutOffError):
        fish(tmp_path / "cut", cut_before=step)
    assert equal(fish(tmp_path / "cut"), weights)


def test_adam_is_given_the_way_that_domains_lead_one_after_the_other(tmp_path: Path) -> None:
    module = network(dropout=0.0)
    module.train()
    adam, sgd = torch.optim.Adam(module.parameters(), lr=0.02, fused=True), torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(15):
        inputs, labels = batch(step)
        begun = [parameter.detach().clone() for parameter in module.parameters()]
        for domain in (1, 0):
            sgd.zero_grad()
            F.cross_entropy(module(inputs[domain == DOMAINS]), labels[domain == DOMAINS]).backward()
            sgd.step()
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), begun, strict=True):
                parameter.grad = (value - parameter) / (0.1 * 2)
                parameter.copy_(value)
        adam.step()
    _, weights = train(tmp_path, network(0.0), training=CONSTANT, scored=False, gradient=FISH.gradient, batches=batch_of_domains)
    for name, parameter in module.named_parameters():
        if name != "0.bias":  # batch-norm takes it away: its gradient is rounding, which Adam makes steps of
            torch.testing.assert_close(weights[f"model.{name}"], parameter.detach(), rtol=1e-3, atol=1e-4)


def swad(module: nn.Module) -> SWAD:
    return SWAD(CLASSES, network=module, start_patience=1, end_patience=1, tolerance=1.0)


@pytest.mark.parametrize("step", [2, 3, 5, 8, 13, 14])
def test_cut_off_and_resumed_with_averaged_weights_is_bit_equal(tmp_path: Path, step: int) -> None:
    module = network()
    progress, weights = train(tmp_path / "undisturbed", module, average=swad(module))
    with pytest.raises(CutOffError):
        module = network()
        train(tmp_path / "cut", module, cut_before=step, average=swad(module))
    module = network()
    resumed_progress, resumed = train(tmp_path / "cut", module, average=swad(module))
    assert equal(resumed, weights)
    assert resumed_progress.scores == progress.scores


def test_cut_off_after_the_average_is_taken_and_resumed_is_bit_equal(tmp_path: Path) -> None:
    """The training is done, but its stage not finished: the checkpoint is of the last weights, not of their average."""
    module = network()
    _, weights = train(tmp_path, module, average=swad(module))
    module = network()
    assert equal(train(tmp_path, module, average=swad(module))[1], weights)


def test_kept_weights_are_the_mean_over_the_window_of_those_of_training(tmp_path: Path) -> None:
    """The window begins with the first score, after step 4, and ends with the last: no loss is above the limit."""
    module = network()
    seen: list[dict[str, Tensor]] = []

    class Watched(SWAD):
        def stepped(self, network: nn.Module) -> None:
            seen.append({name: value.clone() for name, value in network.state_dict().items()})
            super().stepped(network)

    average = Watched(CLASSES, network=module, start_patience=1, end_patience=1000, tolerance=1000.0)
    progress, weights = train(tmp_path, module, average=average)
    assert progress.scores[0][0] == 4 and len(seen) == 15
    for name, value in module.state_dict().items():
        assert torch.equal(weights[f"model.{name}"], value)
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([each[name] for each in seen[3:]]).mean(dim=0))
    _, plain = train(tmp_path / "plain", network(), scored=False)
    assert all(torch.equal(plain[f"model.{name}"], value) for name, value in seen[-1].items()), "training itself is as ever"


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


@pytest.mark.parametrize("gradient", [gradient_of_loss, FISH.gradient], ids=["erm", "fish"])
def test_a_batch_without_finite_numbers_leaves_everything_as_it_was(tmp_path: Path, gradient: Gradient) -> None:
    """The training is that of the other steps alone, batch-norm statistics included; one image spoils it for all."""
    spoiled = {2, 3, 9}

    def some(step: int) -> tuple[Tensor, Tensor, Tensor]:
        inputs = INPUTS[:8].clone()
        inputs[-1] *= math.nan if step in spoiled else 1.0
        return inputs, LABELS[:8], DOMAINS

    def found_by(name: str, training: TrainingConfig) -> tuple[Progress, dict[str, Tensor]]:
        return train(tmp_path / name, network(0.0), training=training, scored=False, gradient=gradient, batches=some)

    progress, found = found_by("spoiled", CONSTANT)
    assert progress.skipped == 3
    spoiled.clear()
    _, expected = found_by("short", CONSTANT.model_copy(update={"duration": Duration(12, "steps")}))
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
