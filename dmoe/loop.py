"""The one loop under every training: steps, checkpoints, evaluation, the best weights kept, bars and scalars.

What a step does is the caller's. A training that was cut off at any moment and taken up again ends in the very numbers of one
that was not: a checkpoint holds all state, and steps take their randomness from their number.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dmoe.artifacts import load_into, load_tensors, save_tensors, under_prefix, with_prefix
from dmoe.console import Scalars, progress_bar
from dmoe.optimizers import ScheduledAdam
from dmoe.run_folder import Stage

LOG_EVERY = 20
"""Steps between scalars."""

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
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for path, value in under_prefix(f"optimizer.{name}", tensors).items():
                index, key = path.split(".")
                state.setdefault(int(index), {})[key] = value
            groups = optimizer.adam.state_dict()["param_groups"]
            optimizer.adam.load_state_dict({"state": state, "param_groups": groups})


@dataclass
class Progress:
    """Where a training stands; saved with each checkpoint."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = -1
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    scores: list[tuple[int, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        return vars(self)

    def summary(self) -> str:
        """For the user, in a few words."""
        best = f", best on validation {self.best_score:.3f} after step {self.best_step}" if self.best_step >= 0 else ""
        return f"{self.step} steps in {self.seconds:.0f} s{best}"


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
) -> Progress:
    """Train, or go on training, until the stage is done; the modules then hold the best weights, and so does the stage's file.

    Args:
        step: performs the step of that number, returns scalars.
        start: told once, before the first step, which number that is.
        evaluate: a score, higher is better; None keeps the last weights.
        evaluate_every: steps between evaluations; there is one after the last step in any case.
        report: called now and then.
    """
    checkpoint, best = stage.folder / "checkpoint.safetensors", stage.folder / "best.safetensors"
    progress = _resume(stage, trainee)
    began, cpu_began = time.perf_counter() - progress.seconds, time.process_time() - progress.cpu_seconds
    start(progress.step)
    with (
        Scalars(stage.folder / "tensorboard", start=progress.step) as scalars,
        progress_bar(stage.name, total=steps, start=progress.step) as bar,
    ):
        for number in range(progress.step, steps):
            values = step(number)
            done = progress.step = number + 1
            bar.update()
            if done % LOG_EVERY == 0 or done == steps:
                scalars.write(done, values)
                if report is not None:
                    report(done, steps, values)
            due = evaluate is not None and (done == steps or (evaluate_every > 0 and done % evaluate_every == 0))
            if due and evaluate is not None:
                score = evaluate()
                scalars.write(done, {"validation": score})
                progress.scores.append((done, score))
                if score > progress.best_score:
                    progress.best_score, progress.best_step = score, done
                    save_tensors(best, trainee.weights())
            if due or done % checkpoint_every == 0 or done == steps:
                progress.seconds, progress.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
                facts = {"inputs": dict(stage.inputs), "progress": vars(progress)}
                save_tensors(checkpoint, {**trainee.weights(), **trainee.moments()}, facts)
    if progress.best_step >= 0:
        trainee.load_weights(load_tensors(best)[0], where=str(best))
    save_tensors(stage.weights, trainee.weights())
    return progress


def tidy(stage: Stage) -> None:
    """Drop what only an unfinished training needs."""
    for name in ("checkpoint.safetensors", "best.safetensors"):
        (stage.folder / name).unlink(missing_ok=True)


def _resume(stage: Stage, trainee: Trainee) -> Progress:
    path = stage.folder / "checkpoint.safetensors"
    if not path.exists():
        return Progress()
    tensors, facts = load_tensors(path)
    stage.refuse_other_inputs(facts.get("inputs", {}), path)
    trainee.load_weights(tensors, where=str(path))
    trainee.load_moments(tensors)
    return Progress(**{**facts["progress"], "scores": [tuple(entry) for entry in facts["progress"]["scores"]]})
