"""Which settings a method is compared with, and for how long it is trained: by the first seed for all.

A few settings are tried on the validation domains. What is trained is tried in two rounds, as by successive halving (Jamieson &
Talwalkar, AISTATS 2016): all for a short time, then the best of them for longer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmoe.artifacts import read_json
from dmoe.compare.candidates import CANDIDATES, OURS, Candidate, Settings, Trial
from dmoe.config import Duration
from dmoe.console import say
from dmoe.errors import DoesNotApply, UserError
from dmoe.run import Run
from dmoe.run_folder import RunFolder, seconds_in
from dmoe.testing import finite

FINALISTS = 2
"""Settings of the second round."""

LONGER = 4
"""How many times as long as a trial of the first round one of the second is."""


@dataclass(frozen=True)
class Choice:
    """What was found on the validation domains, for all seeds.

    Attributes:
        settings: the best of those that were tried.
        steps: of a training that takes as much CPU time as all stages of a run together; 0 where nothing is trained.
    """

    settings: Settings
    steps: int


@dataclass(frozen=True)
class Tried:
    """A setting that was tried.

    Attributes:
        number: among those of the candidate.
        steps: of its training; 0 where nothing is trained.
        score: on the validation domains, by the main protocol; higher is better.
        seconds: CPU seconds of its training.
    """

    number: int
    settings: Settings
    steps: int
    score: float
    seconds: float

    @property
    def row(self) -> dict[str, Any]:
        """Facts of a result."""
        tried = {"trial": self.number, "settings": dict(self.settings), "steps": self.steps}
        return {**tried, "split": "validation", "score": finite(self.score)}


def choose(trial: Trial, candidate: Candidate, *, already: float) -> tuple[Choice, list[Tried]]:
    """The settings that score best on the validation domains, by the main protocol, and all that were tried.

    Args:
        already: CPU seconds of training that the method goes on from.
    """
    steps = _trial_steps(trial, candidate)
    everything = list(enumerate(candidate.tried[: trial.run.config.compare.trials]))
    tried = [_try(replace(trial, name=f"trial_{number}"), candidate, number, settings, steps) for number, settings in everything]
    last = tried
    if len(tried) > 1 and tried[0].steps:
        last = [
            _try(replace(trial, name=f"longer_trial_{one.number}"), candidate, one.number, one.settings, LONGER * steps)
            for one in _best_first(tried)[:FINALISTS]
        ]
        tried = [*tried, *last]
    best = _best_first(last)[0]
    full = max(1, round((budget(trial.run) - already) * best.steps / best.seconds)) if best.steps else 0
    return Choice(best.settings, full), tried


def _try(trial: Trial, candidate: Candidate, number: int, settings: Settings, steps: int) -> Tried:
    trial = replace(trial, duration=Duration(steps, "steps"))
    method = candidate.make(trial, settings)
    score = trial.run.evaluate(method, "validation", trial.run.protocol).score
    seconds = trial.training_seconds
    length = "" if seconds is None else f" after {steps} steps"
    say(f"{trial.stage.name}: {json.dumps(dict(settings))}: {score:.4f} on validation{length}")
    return Tried(number, settings, 0 if seconds is None else steps, score, seconds or 0.0)


def _best_first(tried: Sequence[Tried]) -> list[Tried]:
    return sorted(tried, key=lambda one: one.score if math.isfinite(one.score) else -math.inf, reverse=True)


def _trial_steps(trial: Trial, candidate: Candidate) -> int:
    """How long a trial is, so that all methods' take about the same CPU time, whatever a step of theirs costs.

    A first, short training tells the pace; it is as many steps as the run's student takes in a quarter of a trial's time.
    """
    run = trial.run
    student = read_json(run.folder.path / "student" / "manifest.json")["figures"]
    seconds = run.config.compare.trial_share * budget(run)
    few: int = max(1, round(seconds / 4 * student["step"] / student["cpu_seconds"]))
    short = replace(trial, name="pace", duration=Duration(few, "steps"))
    candidate.make(short, candidate.tried[0])
    return few if short.training_seconds is None else max(1, round(seconds * few / short.training_seconds))


def choice_of(chosen_by: Path, key: str) -> Choice:
    """What the first seed chose, or an earlier comparison."""
    if chosen_by.is_file():
        return _choice_in(chosen_by, key)
    path = RunFolder(chosen_by).stage(f"compare/{key}", {}).manifest
    if not path.is_file():
        raise UserError(f"{path}: the first seed's settings are not chosen yet: compare it first")
    figures = read_json(path).get("figures", {})
    try:
        return Choice(dict(figures["chosen"]), int(figures["steps"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged (figures): delete {path.parent} to redo it") from None


def _choice_in(results: Path, key: str) -> Choice:
    """What earlier results say; a method that was left out there is left out here."""
    name = CANDIDATES[key].name
    try:
        tested = [row for row in rows_of(results) if row["method"] == name and row["kind"] == "test"]
        if not tested:
            raise DoesNotApply(f"{results} has no result of it")
        return Choice(dict(tested[0]["settings"]), int(tested[0]["steps"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{results}: it does not say which settings and how many steps {key} had: leave out --chosen_by") from None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Results, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def budget(run: Run) -> float:
    """CPU seconds of all stages of a run together: what each method may be trained for."""
    return sum(seconds_of(run, stage) for stage in OURS)


def seconds_of(run: Run, stage: str) -> float:
    """CPU seconds of a stage and of those in it."""
    return seconds_in(run.folder.path / stage) or 0.0
