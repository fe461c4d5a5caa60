"""The one training by a loss of batches: experts, the aggregator's pretraining and the student's are calls of it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from dmoe.config import TrainingConfig
from dmoe.data.streams import stream
from dmoe.loop import Progress, Report, Trainee, run
from dmoe.objectives import SWAD, Gradient, gradient_of_loss
from dmoe.optimizers import SKIPPED, ScheduledAdam, step_if_finite
from dmoe.precision import Precision, computing_in, not_coarse
from dmoe.randomness import seed_of
from dmoe.run_folder import Stage
from dmoe.tasks import Task

BatchLoss = Callable[..., Tensor]
"""(number of a step, the tensors of its batch) to a scalar."""


def task_loss(logits: Callable[[Tensor], Tensor], task: Task, *, precision: Precision, device: torch.device) -> BatchLoss:
    """The task loss of batches of inputs ``[B, ...]`` and labels ``[B]``, where ``logits`` is the forward pass to ``[B, K]``."""

    def loss(step: int, inputs: Tensor, labels: Tensor) -> Tensor:
        with computing_in(precision, device):
            said = logits(inputs)
        return task.loss(not_coarse(said), labels)

    return loss


def train_supervised(
    *,
    stage: Stage,
    module: nn.Module,
    loss: BatchLoss,
    batch: Callable[[int], tuple[Tensor, ...]],
    steps_per_epoch: int,
    training: TrainingConfig,
    evaluate: Callable[[], float] | None,
    checkpoint_every: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    report: Report | None = None,
    describe: Callable[[int], str] | None = None,
    objective: nn.Module | None = None,
    restart_at: int | None = None,
    gradient: Gradient = gradient_of_loss,
    average: SWAD | None = None,
) -> Progress:
    """Train ``module`` by a loss of batches; it ends with its best weights, or their average, in eval mode.

    Args:
        loss: runs with ``module`` in training mode.
        batch: tensors of a step, a pure function of its number.
        evaluate: a score, higher is better; called with ``module`` in eval mode.
        seed: of dropout.
        objective: weights and state that the loss has of its own; trained and kept with the module, but of no use after it.
        restart_at: the step before which Adam forgets its moments.
        gradient: what Adam is given, of the loss and the tensors of a step.
        average: told of every step, and kept with the module; ``evaluate`` tells it of losses. It has the weights in the end.
        describe: see :func:`dmoe.loop.run`.
    """
    steps = training.duration.steps(steps_per_epoch)
    # The aggregator's output map has no part in its pretraining: Adam leaves alone what has no gradient.
    modules = {"model": module} if objective is None else {"model": module, "objective": objective}
    parameters = [parameter for each in modules.values() for parameter in each.parameters()]
    adam = ScheduledAdam(parameters, training.optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    kept_modules = modules if average is None else {**modules, "average": average}
    batches: Iterator[tuple[Tensor, ...]] = iter(())  # replaced at the start, when the loop knows where it goes on
    buffers = [
        buffer for each in modules.values() for buffer in each.buffers()
    ]  # statistics of batch-norm, which a batch that is no good would spoil for ever
    before = [buffer.clone() for buffer in buffers]

    def start(first: int) -> None:
        nonlocal batches
        batches = stream(batch, start=first, stop=steps, workers=workers)
        module.train()

    def step(number: int) -> dict[str, float]:
        if number == restart_at:
            adam.restart()
        tensors = [tensor.to(device, non_blocking=True) for tensor in next(batches)]
        for kept, buffer in zip(before, buffers, strict=True):
            kept.copy_(buffer)
        torch.manual_seed(seed_of(seed, "dropout", number))
        found = gradient(partial(loss, number), tensors, parameters)
        values = {"loss": found.item(), "learning_rate": adam.learning_rate(number)}
        values = step_if_finite(number, values, {"gradient_norm": adam})
        if SKIPPED in values:
            for kept, buffer in zip(before, buffers, strict=True):
                buffer.copy_(kept)
        elif average is not None:
            average.stepped(module)
        return values

    def score() -> float:
        assert evaluate is not None
        module.eval()
        value = evaluate()
        module.train()
        return value

    progress = run(
        stage=stage,
        trainee=Trainee(modules=kept_modules, optimizers={"adam": adam}),
        step=step,
        steps=steps,
        start=start,
        evaluate=None if evaluate is None else score,
        evaluate_every=training.evaluate_every.steps(steps_per_epoch),
        checkpoint_every=checkpoint_every,
        report=report,
        describe=describe,
        settle=None if average is None else partial(average.settle, module),
    )
    module.eval()
    return progress
