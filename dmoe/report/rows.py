"""The rows of ``results.jsonl``: of a comparison, and of a plain run, which says less."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmoe.errors import UserError
from dmoe.report.files import name_of, objects_in_lines

MOST_ROWS = 20_000
MOST_METHODS = 60
MOST_DOMAINS = 1_000
LARGEST_NUMBER = 1e15
"""Of a metric or a cost; larger ones would only break axes."""

NEVER_RUN = "run.py makes it: give the folder of a finished run or comparison"


@dataclass(frozen=True)
class Protocol:
    """How a method was tested.

    Attributes:
        name: ``per domain``, ``per batch``, ``continual``, ``mixed stream``, ``label-skewed stream``.
        support_size: unlabeled images that are adapted to at a time.
        score_support: whether they count in the score.
        predict: ``after`` the update or ``before`` it.
        images: how many of each domain are predicted; None: all.
    """

    name: str
    support_size: int
    score_support: bool = True
    predict: str = "after"
    images: int | None = None


@dataclass(frozen=True)
class Row:
    """A test of a method with one seed.

    Attributes:
        kind: ``test``, or ``ablation``, which has a ``group`` and a ``setting``.
        metric: the headline metric, which ``mean``, ``worst`` and ``domains`` are in.
        unit: ``fraction`` or ``value``.
        mean, worst: over domains; None: not a number.
        cost: any of training_cpu_seconds, adapt_ms, predictions_per_second, peak_mb.
        facts: ``config``, ``data``, ``versions`` as they were written, where they were.
    """

    kind: str
    method: str
    dataset: str
    split: str
    seed: int
    protocol: Protocol
    metric: str
    unit: str
    mean: float | None
    worst: float | None
    domains: Mapping[str, float | None]
    cost: Mapping[str, float] = field(default_factory=dict)
    settings: str = ""
    paper: str = ""
    group: str = ""
    setting: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """Settings tried on validation domains."""

    method: str
    settings: str
    split: str
    seed: int
    score: float | None


@dataclass(frozen=True)
class Results:
    """All that a ``results.jsonl`` says of one data set; of tests that were made twice, the last."""

    dataset: str
    tests: tuple[Row, ...]
    ablations: tuple[Row, ...]
    trials: tuple[Trial, ...]


def read_results(path: Path) -> Results:
    """The rows of a file.

    Raises:
        UserError: there is no such file, a line is damaged, there are no tests in it, or it is of several data sets.
    """
    tests: dict[tuple[object, ...], Row] = {}
    trials: dict[tuple[object, ...], Trial] = {}
    for number, (where, facts) in enumerate(objects_in_lines(path, way=NEVER_RUN), start=1):
        if number > MOST_ROWS:
            raise UserError(f"{where}: more than {MOST_ROWS:,} rows: give a folder of one comparison")
        try:
            if facts.get("kind") == "trial":
                trial = _trial(facts)
                trials[trial.method, trial.settings, trial.seed, trial.split] = trial
            else:
                row = _row(facts)
                tests[row.kind, row.group, row.setting, row.method, row.dataset, row.split, row.seed, row.protocol] = row
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: damaged, no result ({fault}): mend it, or delete it to make it again") from None
    return _of_one_dataset(path, list(tests.values()), list(trials.values()))


def settings_text(settings: Any) -> str:
    """Settings as one prints them: ``lr=0.001, steps=10``."""
    if not isinstance(settings, Mapping):
        return ""
    return name_of(", ".join(f"{key}={value:g}" if _is_number(value) else f"{key}={value}" for key, value in settings.items()))


def _of_one_dataset(path: Path, rows: list[Row], trials: list[Trial]) -> Results:
    splits = {row.split for row in rows}
    kept = [row for row in rows if row.split == ("target" if "target" in splits else rows[0].split)]
    tests = tuple(row for row in kept if row.kind == "test")
    if not tests:
        raise UserError(f"{path}: holds no tests: {NEVER_RUN}")
    for what, found, most in (
        ("data sets", {row.dataset for row in kept}, 1),
        ("units", {row.unit for row in kept}, 1),
        ("methods", {row.method for row in kept}, MOST_METHODS),
        ("domains", {domain for row in kept for domain in row.domains}, MOST_DOMAINS),
    ):
        if len(found) > most:
            raise UserError(f"{path}: {len(found)} {what}, expected {most} at most: give a folder of one comparison")
    return Results(tests[0].dataset, tests, tuple(row for row in kept if row.kind == "ablation"), tuple(trials))


def _row(facts: Mapping[str, Any]) -> Row:
    """A row of a comparison, or one that :func:`dmoe.testing.result_row` made, which is of the protocol ``per domain``.

    Raises:
        AttributeError, KeyError, TypeError, ValueError, OverflowError: it is neither.
    """
    kind = facts.get("kind", "test")
    if kind not in ("test", "ablation"):
        raise ValueError(f"kind {kind!r}")
    unit = facts["unit"]
    if unit not in ("fraction", "value"):
        raise ValueError(f"unit {unit!r}")
    metric, domains = _headline(facts["domains"], str(facts["metric"]), unit)
    cost = facts.get("cost", {})
    return Row(
        kind=kind,
        method=name_of(facts["method"]),
        dataset=name_of(facts["dataset"]),
        split=name_of(facts["split"]),
        seed=_whole(facts["seed"]),
        protocol=Protocol(
            name=name_of(facts.get("protocol", "per domain")),
            support_size=_whole(facts["support_size"]),
            score_support=bool(facts.get("score_support", True)),
            predict=name_of(facts.get("predict", "after")),
            images=None if facts.get("images") is None else _whole(facts["images"]),
        ),
        metric=metric,
        unit=unit,
        mean=number_of(facts["mean"]),
        worst=number_of(facts["worst"]),
        domains=domains,
        cost={name_of(key): number for key, value in cost.items() if (number := number_of(value)) is not None},
        settings=settings_text(facts.get("settings")),
        paper=name_of(facts.get("paper", "")),
        group=name_of(facts.get("group", "")),
        setting=name_of(facts.get("setting", "")),
        facts={key: facts[key] for key in ("config", "data", "versions") if key in facts},
    )


def _trial(facts: Mapping[str, Any]) -> Trial:
    return Trial(
        method=name_of(facts["method"]),
        settings=settings_text(facts["settings"]),
        split=name_of(facts.get("split", "validation")),
        seed=_whole(facts.get("seed", 0)),
        score=number_of(facts["score"]),
    )


def _headline(domains: Any, metric: str, unit: str) -> tuple[str, dict[str, float | None]]:
    """The headline metric of each domain, and its name; a plain run has all metrics of a domain."""
    if not isinstance(domains, Mapping):
        raise TypeError("domains are no object")
    headline = "r" if unit == "value" else "accuracy"  # as dmoe.tasks has it
    nested = [value for value in domains.values() if isinstance(value, Mapping)]
    name = headline if nested and all(headline in value for value in nested) else metric
    values = {name_of(domain): number_of(value[name] if isinstance(value, Mapping) else value) for domain, value in domains.items()}
    return name_of(name), values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_of(value: Any) -> float | None:
    """A number from a file, or None for what is not known: ``null``, or Python's ``NaN``.

    Raises:
        TypeError, ValueError, OverflowError: it is something else, or no sensible one.
    """
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"{value!r:.40} is no number")
    number = float(value)
    if math.isnan(number):
        return None
    if not abs(number) < LARGEST_NUMBER:
        raise ValueError(f"{value!r:.40} is too large")
    return number


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is no whole number")
    return value
