"""The one supervised training: experts, the aggregator's pretraining and the student's are three calls of it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dmoe.config import TrainingConfig
from dmoe.data.streams import stream
from dmoe.loop import Progress, Report, Trainee, run
from dmoe.optimizers import SKIPPED, ScheduledAdam, step_if_finite
from dmoe.precision import computing_in, not_coarse
from dmoe.randomness import seed_of
from dmoe.run_folder import Stage
from dmoe.tasks import Task


def train_supervised(
    *,
    stage: Stage,
    module: nn.Module,
    logits: Callable[[Tensor], Tensor],
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps_per_epoch: int,
    task: Task,
    training: TrainingConfig,
    evaluate: Callable[[], float] | None,
    checkpoint_every: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
    report: Report | None = None,
    describe: Callable[[int], str] | None = None,
) -> Progress:
    """Train ``module`` on labeled batches by the task loss; it ends with its best weights, in eval mode.

    Args:
        logits: the forward pass, inputs ``[B, ...] -> [B, K]``; runs with ``module`` in training mode.
        batch: inputs and labels of a step, a pure function of its number.
        evaluate: a score, higher is better; called with ``module`` in eval mode.
        seed: of dropout.
        describe: see :func:`dmoe.loop.run`.
    """
    steps = training.duration.steps(steps_per_epoch)
    # The aggregator's output map has no part in its pretraining: Adam leaves alone what has no gradient.
    adam = ScheduledAdam(module.parameters(), training.optimizer, steps=steps, steps_per_epoch=steps_per_epoch)
    batches: Iterator[tuple[Tensor, Tensor]] = iter(())  # replaced at the start, when the loop knows where it goes on
    buffers = list(module.buffers())  # statistics of batch-norm, which a batch that is no good would spoil for ever
    before = [buffer.clone() for buffer in buffers]

    def start(first: int) -> None:
        nonlocal batches
        batches = stream(batch, start=first, stop=steps, workers=workers)
        module.train()

    def step(number: int) -> dict[str, float]:
        inputs, labels = next(batches)
        for kept, buffer in zip(before, buffers, strict=True):
            kept.copy_(buffer)
        torch.manual_seed(seed_of(seed, "dropout", number))
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with computing_in(training.precision, device):
            said = logits(inputs)
        loss = task.loss(not_coarse(said), labels)
        loss.backward()
        values = {"loss": loss.item(), "learning_rate": adam.learning_rate(number)}
        values = step_if_finite(number, values, {"gradient_norm": adam})
        if SKIPPED in values:
            for kept, buffer in zip(before, buffers, strict=True):
                buffer.copy_(kept)
        return values

    def score() -> float:
        assert evaluate is not None
        module.eval()
        value = evaluate()
        module.train()
        return value

    progress = run(
        stage=stage,
        trainee=Trainee(modules={"model": module}, optimizers={"adam": adam}),
        step=step,
        steps=steps,
        start=start,
        evaluate=None if evaluate is None else score,
        evaluate_every=training.evaluate_every.steps(steps_per_epoch),
        checkpoint_every=checkpoint_every,
        report=report,
        describe=describe,
    )
    module.eval()
    return progress
