"""The one loop under every training: steps, checkpoints, evaluation, the best weights kept, bars and scalars.

What a step does is the caller's. A training that was cut off at any moment and taken up again ends in the very numbers of one
that was not: a checkpoint holds all state, and steps take their randomness from their number. Ctrl-C and SIGTERM wait for the end
of the step and for a checkpoint of it.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmoe import interruption
from dmoe.artifacts import load_into, load_tensors, save_tensors, under_prefix, with_prefix
from dmoe.console import Scalars, progress_bar, say
from dmoe.distributed import ALONE, World
from dmoe.errors import UserError
from dmoe.optimizers import SKIPPED, ScheduledAdam
from dmoe.run_folder import Stage

LOG_EVERY = 20
"""Steps between scalars."""

CHECKPOINT, PREVIOUS, BEST = "checkpoint.safetensors", "checkpoint.previous.safetensors", "best.safetensors"

SKIPPED_AT_MOST = 5
"""Steps in a row without finite numbers; then the training has come to its end, and going on would only hide it."""

Report = Callable[[int, int, Mapping[str, float]], None]
"""Told (steps done, steps, scalars)."""


@dataclass
class Trainee:
    """All that changes in a training.

    Attributes:
        modules: their tensors are what is trained and, at the end, kept.
        optimizers: by name; their moments are part of a checkpoint.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, ScheduledAdam]

    def weights(self) -> dict[str, Tensor]:
        return {k: v for name, module in self.modules.items() for k, v in with_prefix(name, module.state_dict()).items()}

    def load_weights(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        for name, module in self.modules.items():
            load_into(module, under_prefix(name, tensors), where=where)

    def moments(self) -> dict[str, Tensor]:
        """Adam's state as named tensors."""
        return {
            f"optimizer.{name}.{index}.{key}": value
            for name, optimizer in self.optimizers.items()
            for index, entry in optimizer.adam.state_dict()["state"].items()
            for key, value in entry.items()
        }

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """
        Raises:
            ValueError: they are not of these optimizers.
        """
        for name, optimizer in self.optimizers.items():
            shapes = {
                f"{index}.{key}": shape
                for index, parameter in enumerate(optimizer.parameters)
                for key, shape in (("step", torch.Size()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape))
            }
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in under_prefix(f"optimizer.{name}", tensors).items():
                if value.shape != shapes.get(path):
                    raise ValueError(f"optimizer.{name}.{path} {list(value.shape)} is none of this training's")
                index, key = path.split(".")
                state.setdefault(int(index), {})[key] = value
            if any(len(entry) != 3 for entry in state.values()):
                raise ValueError(f"optimizer.{name} lacks a tensor")
            groups = optimizer.adam.state_dict()["param_groups"]
            optimizer.adam.load_state_dict({"state": state, "param_groups": groups})


def _whole(number: Any) -> int:
    if type(number) is not int or not -1 <= number < 1 << 63:
        raise ValueError(f"{number!r} is no number of steps")
    return number


@dataclass
class Progress:
    """Where a training stands; saved with each checkpoint.

    Attributes:
        scores: of the evaluations, by steps done.
        skipped: steps whose loss or gradient was no finite number.
        skipped_in_a_row: the last ones, if they were such.
    """

    step: int = 0
    best_score: float = -math.inf
    best_step: int = -1
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    scores: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Progress":
        """What a checkpoint holds of it.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it holds something else.
        """
        scores = [(_whole(step), float(score)) for step, score in facts["scores"]]
        made = cls(**{**facts, "scores": scores})
        for each in fields(cls):
            if each.type is int:
                _whole(getattr(made, each.name))
            elif each.type is float:
                float(getattr(made, each.name))
        return made

    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        return vars(self)

    def summary(self) -> str:
        """For the user, in a few words."""
        best = f", best on validation {self.best_score:.3f} after step {self.best_step}" if self.best_step >= 0 else ""
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        return f"{self.step} steps in {self.seconds:.0f} s{skipped}{best}"


def run(
    *,
    stage: Stage,
    trainee: Trainee,
    step: Callable[[int], Mapping[str, float]],
    steps: int,
    start: Callable[[int], None],
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 0,
    checkpoint_every: int,
    report: Report | None = None,
    describe: Callable[[int], str] | None = None,
    world: World = ALONE,
    settle: Callable[[], None] | None = None,
) -> Progress:
    """Train, or go on training, until the stage is done; the modules then hold the best weights, and so does the stage's file.

    Args:
        step: performs the step of that number, returns scalars; one is ``skipped`` where it did nothing.
        start: told once, before the first step, which number that is.
        evaluate: a score, higher is better; None keeps the last weights.
        evaluate_every: steps between evaluations; there is one after the last step in any case.
        report: called now and then.
        describe: what a step trains on, for people.
        world: the processes that train together; the first of them writes.
        settle: makes of the last weights those that are kept, in place of the best.

    Raises:
        UserError: loss or gradient of several steps in a row were no finite numbers, or a file cannot be written or read.
    """
    progress = _resume(stage, trainee)
    if progress.step:
        say(f"{stage.name}: going on after step {progress.step} of {steps}")
    world.spread(trainee.weights().values())
    began, cpu_began = time.perf_counter() - progress.seconds, time.process_time() - progress.cpu_seconds

    def is_due() -> bool:
        """Whether an evaluation is."""
        done = progress.step
        if evaluate is None or (progress.scores and progress.scores[-1][0] == done):
            return False
        return done == steps or (done > 0 and evaluate_every > 0 and done % evaluate_every == 0)

    def checkpoint() -> None:
        if not world.is_first:
            return
        progress.seconds, progress.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        facts = {"inputs": dict(stage.inputs), "progress": vars(progress)}
        tensors = {**trainee.weights(), **trainee.moments()}
        save_tensors(stage.folder / CHECKPOINT, tensors, facts, keep=stage.folder / PREVIOUS)

    start(progress.step)
    with (
        Scalars(stage.folder / "tensorboard" if world.is_first else None, start=progress.step) as scalars,
        progress_bar(stage.name, total=steps, start=progress.step) as bar,
        interruption.held(),
    ):
        while progress.step < steps or is_due():
            if is_due() and evaluate is not None:
                with interruption.not_held():
                    score = evaluate()
                scalars.write(progress.step, {"validation": score})
                progress.scores.append((progress.step, score))
                if score > progress.best_score:
                    progress.best_score, progress.best_step = score, progress.step
                    if world.is_first:
                        save_tensors(stage.folder / BEST, trainee.weights())
                checkpoint()
                continue
            number = progress.step
            values = step(number)
            done = progress.step = number + 1
            bar.update()
            _watch(progress, values, stage, number, describe)
            if done % LOG_EVERY == 0 or done == steps:
                scalars.write(done, values)
                if report is not None:
                    report(done, steps, values)
            asked = world.any(interruption.asked())
            if is_due() or done % checkpoint_every == 0 or done == steps or asked:
                checkpoint()
            if asked:
                say(f"{stage.name}: step {done} of {steps} is done and saved")
                interruption.let_through(anyway=True)
    _keep_best(stage, trainee, progress, world, settle)
    return progress


def tidy(stage: Stage) -> None:
    """Drop what only an unfinished training needs."""
    for name in (CHECKPOINT, PREVIOUS, BEST):
        (stage.folder / name).unlink(missing_ok=True)


def _keep_best(stage: Stage, trainee: Trainee, progress: Progress, world: World, settle: Callable[[], None] | None = None) -> None:
    """Leave the best weights, the last where none were chosen, or what ``settle`` makes, in the modules and in the stage's file."""
    world.wait()  # for the best weights to be there
    if settle is not None:
        settle()
    elif progress.best_step >= 0:
        trainee.load_weights(load_tensors(stage.folder / BEST)[0], where=str(stage.folder / BEST))
    if world.is_first:
        save_tensors(stage.weights, trainee.weights())


def _watch(
    progress: Progress, values: Mapping[str, float], stage: Stage, number: int, describe: Callable[[int], str] | None
) -> None:
    """Count steps that were skipped; the first is told, and too many in a row are the end."""
    if not values.get(SKIPPED):
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if not math.isfinite(value))
    if progress.skipped_in_a_row >= SKIPPED_AT_MOST:
        where = f" ({describe(number)})" if describe is not None else ""
        raise UserError(
            f"{stage.name}: {told} in step {number}{where}, the {SKIPPED_AT_MOST}th step in a row without finite numbers: look at "
            "these images, or choose a lower learning rate or a max_gradient_norm in another --run_dir"
        )
    if progress.skipped == 1:
        say(f"{stage.name}: {told} in step {number}: it is skipped; others will be too, and counted")


def _resume(stage: Stage, trainee: Trainee) -> Progress:
    """Take up the last checkpoint, or the one before it if the last is damaged."""
    paths = [path for name in (CHECKPOINT, PREVIOUS) if (path := stage.folder / name).exists()]
    for path in paths:
        try:
            tensors, inputs, progress = _read_checkpoint(path)
        except UserError as error:
            if path == paths[-1]:
                raise
            say(f"{error}; going on from {paths[-1].name}")
            continue
        stage.refuse_other_inputs(inputs, path)
        trainee.load_weights(tensors, where=str(path))
        try:
            trainee.load_moments(tensors)
        except ValueError as error:
            raise _no_checkpoint(path, error) from None
        return progress
    return Progress()


def _no_checkpoint(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: no checkpoint of a training ({type(error).__name__}: {error}): delete it")


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Progress]:
    tensors, facts = load_tensors(path)
    try:
        return tensors, dict(facts["inputs"]), Progress.from_facts(facts["progress"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _no_checkpoint(path, error) from None
