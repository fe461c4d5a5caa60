"""What the rows say: one thing to look up for each table and figure, the same for the page and for the README."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dmoe.report.rows import Protocol, Results, Row, Trial
from dmoe.report.statistics import Difference, Spread, half_width, paired_difference, spread

# Of each role, the name in a comparison and the name in a plain run.
BASELINE = ("ERM", "ERM student")
OURS = ("Meta-DMoE", "adapted")
BEFORE = ("Meta-DMoE before adapting", "before adapting")
ORACLE = "oracle: told the domain"
VARIANTS = ("Meta-DMoE, target of zeros", "Meta-DMoE, GMoE student", "Meta-DMoE, EMoE student")
NO_RIVALS = {*OURS, *BEFORE, *VARIANTS, ORACLE}
"""Parts of ours, and what is told more than the others: not among "the best other method"."""

TEST_TIME = ("ERM, batch statistics", "ERM, mixed statistics", "TENT", "SHOT-IM", "T3A", "MEMO", "LAME", "EATA", "SAR")
"""Methods that adapt a trained network at test time."""

MISSING = "\N{EN DASH}"
"""What a table has where a number is not known."""

STREAMS = {
    "per domain": "one model a domain, adapted once to its first images; all of its images predicted",
    "support from another domain": "a control: one model a domain, adapted once to the first images of another domain",
    "per batch": "each batch of a domain adapted to from the source model, then predicted",
    "continual": "batches of one domain after another, each going on from where the one before left; the model is never reset",
    "mixed stream": "batches of all domains mixed, each adapted to from the source model, then predicted",
    "label-skewed stream": "batches of a domain sorted by class, each adapted to from the source model, then predicted",
}

GROUPS = {
    "experts": "Number of experts",
    "aggregator": "Aggregator",
    "parts": "Which parts are meta-trained",
    "distilled": "What is distilled",
    "mask": "Mask of the own expert",
}


@dataclass(frozen=True)
class Line:
    """A line of a table of methods or settings.

    Attributes:
        difference: to the method that the table compares with; None: that one itself, or nothing to compare.
        cost: means over seeds.
    """

    name: str
    mean: Spread | None
    worst: Spread | None
    difference: Difference | None
    cost: Mapping[str, float]
    paper: str = ""


@dataclass(frozen=True)
class Tried:
    """The settings of a method that were tried on validation domains: ``(settings, score)``, the best first.

    Attributes:
        chosen: those that it was tested with.
        seeds: that they were tried with.
    """

    method: str
    split: str
    scores: Sequence[tuple[str, Spread | None]]
    chosen: str
    seeds: Sequence[int]


@dataclass(frozen=True)
class Comparison:
    """A look at the rows of one data set."""

    results: Results

    @cached_property
    def main(self) -> Protocol:
        """The protocol of the table: per domain, support scored, with the support size that most methods were tested with, or of
        several such sizes the one that most other tests have too."""
        per_domain = [row for row in self.results.tests if row.protocol.name == "per domain" and row.protocol.predict == "after"]
        protocols = dict.fromkeys(row.protocol for row in per_domain or self.results.tests)

        def weight(protocol: Protocol) -> tuple[bool, int, int]:
            methods = {row.method for row in self.results.tests if row.protocol == protocol}
            alike = [row for row in self.results.tests if row.protocol.support_size == protocol.support_size]
            return protocol.score_support, len(methods), len(alike)

        return max(protocols, key=weight)

    @cached_property
    def methods(self) -> list[str]:
        """Those of the table, best first; the oracle, which is no rival, last."""
        found = dict.fromkeys(row.method for row in self.results.tests if row.protocol == self.main)
        return sorted(found, key=lambda method: (method == ORACLE, -self._mean(method)))

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.results.tests})

    @cached_property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(domain for row in self._at(self.main) for domain in row.domains))

    @cached_property
    def is_alone(self) -> bool:
        """Whether all of it is of one network trained alone (``method: erm``), which does not adapt."""
        configs = [row.facts.get("config") for row in self.results.tests]
        return all(isinstance(config, Mapping) and config.get("method") == "erm" for config in configs)

    @property
    def baseline(self) -> str | None:
        return self._named(BASELINE)

    @property
    def ours(self) -> str | None:
        return self._named(OURS)

    @property
    def before(self) -> str | None:
        return self._named(BEFORE)

    @cached_property
    def best_other(self) -> str | None:
        """The method with the best mean that is no part of ours. It is picked by the numbers that are shown, to its advantage."""
        return next((method for method in self.methods if method not in NO_RIVALS), None)

    @cached_property
    def lines(self) -> list[Line]:
        """The main table."""
        baseline = self._at(self.main, self.baseline)
        found = []
        for method in self.methods:
            rows = self._at(self.main, method)
            difference = None if method == self.baseline else difference_of(rows, baseline)
            paper = next((row.paper for row in rows if row.paper), "")
            found.append(Line(method, means(rows), worsts(rows), difference, costs(rows), paper))
        return found

    def ours_to(self, method: str | None) -> Difference | None:
        """Ours minus another method, by the main protocol."""
        return difference_of(self._at(self.main, self.ours), self._at(self.main, method))

    def by_support(self) -> dict[str, dict[int, Spread]]:
        """The mean by support size, of methods that were tested with several."""
        found: dict[str, dict[int, Spread]] = {}
        for method in dict.fromkeys(row.method for row in self.results.tests):
            sizes = {row.protocol.support_size for row in self.results.tests if row.method == method} - {0}
            protocols = [replace(self.main, support_size=size) for size in sorted(sizes)]
            known = {protocol.support_size: means(self._at(protocol, method)) for protocol in protocols}
            curve = {size: one for size, one in known.items() if one is not None}
            if len(curve) > 1:
                found[method] = curve
        return found

    def protocols(self) -> list[Protocol]:
        """The main one, then those that differ from it by more than the support size."""
        found = dict.fromkeys(row.protocol for row in self.results.tests)
        others = [protocol for protocol in found if replace(protocol, support_size=self.main.support_size) != self.main]
        return [self.main, *sorted(others, key=_order)]

    def by_protocol(self) -> dict[str, list[Spread | None]]:
        """The mean of each method by each of :meth:`protocols`; of methods that were tested by several."""
        protocols = self.protocols()
        found = {}
        for method in dict.fromkeys([*self.methods, *(row.method for row in self.results.tests)]):
            cells = [means(self._at(protocol, method)) for protocol in protocols]
            if any(cells[1:]):
                found[method] = cells
        return found

    def by_domain(self) -> dict[str, dict[str, tuple[float, float | None]]]:
        """For baseline, before and ours, where they are: of each domain the mean over seeds and half its 95 % interval."""
        found = {}
        for method in (self.baseline, self.before, self.ours):
            rows = self._at(self.main, method) if method is not None else []
            if rows:
                values = {domain: _known(row.domains.get(domain) for row in rows) for domain in self.domains}
                found[str(method)] = {d: (sum(v) / len(v), half_width(v)) for d, v in values.items() if v}
        return found

    def trials(self) -> list[Tried]:
        found = []
        for method in dict.fromkeys(trial.method for trial in self.results.trials):
            trials = [trial for trial in self.results.trials if trial.method == method]
            scores = [
                (settings, spread(_scores(trials, settings))) for settings in dict.fromkeys(trial.settings for trial in trials)
            ]
            scores.sort(key=lambda one: -one[1].mean if one[1] else np.inf)
            tested = [row.settings for row in self._at(self.main, method) if row.settings]
            found.append(
                Tried(
                    method, trials[0].split, scores, tested[0] if tested else scores[0][0], sorted({trial.seed for trial in trials})
                )
            )
        return found

    def ablations(self) -> dict[str, list[Line]]:
        """By group, its settings; the difference is that to ours."""
        ours = self._at(self.main, self.ours)
        found: dict[str, list[Line]] = {}
        for group, setting in dict.fromkeys((row.group, row.setting) for row in self.results.ablations):
            rows = [row for row in self.results.ablations if (row.group, row.setting) == (group, setting)]
            line = Line(setting, means(rows), worsts(rows), difference_of(rows, ours), costs(rows))
            found.setdefault(group, []).append(line)
        return found

    def _at(self, protocol: Protocol, method: str | None = None) -> list[Row]:
        return [row for row in self.results.tests if row.protocol == protocol and method in (None, row.method)]

    def _named(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.methods), None)

    def _mean(self, method: str) -> float:
        found = means(self._at(self.main, method))
        return found.mean if found else -np.inf


def means(rows: Sequence[Row]) -> Spread | None:
    """Of the mean over domains."""
    return spread(_known(row.mean for row in rows))


def worsts(rows: Sequence[Row]) -> Spread | None:
    """Of the worst domain, which may be another one for each seed."""
    return spread(_known(row.worst for row in rows))


def costs(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the seeds of which they are known."""
    names = dict.fromkeys(name for row in rows for name in row.cost)
    return {name: float(np.mean([row.cost[name] for row in rows if name in row.cost])) for name in names}


def difference_of(rows: Sequence[Row], others: Sequence[Row]) -> Difference | None:
    """The first minus the second, paired by seed and domain; None where they have nothing in common."""
    first, second = ({row.seed: row.domains for row in some} for some in (rows, others))
    seeds = [seed for seed in first if seed in second]
    domains = list(dict.fromkeys(domain for seed in seeds for domain in first[seed]))
    if not seeds or not domains:
        return None
    return paired_difference(np.array([[_minus(first[s].get(d), second[s].get(d)) for d in domains] for s in seeds]))


def protocol_text(protocol: Protocol) -> str:
    """In a few words, all of it."""
    return f"{protocol.name}, {details(protocol)}"


def details(protocol: Protocol) -> str:
    """What there is to say of it beside its name."""
    scored = "" if protocol.score_support else ", support not scored"
    some = "" if protocol.images is None else f", the first {protocol.images} of a domain"
    return f"{protocol.support_size} images{scored}{some}, predicted {protocol.predict} the update"


def describe(protocol: Protocol) -> str:
    """In a sentence."""
    how = STREAMS.get(protocol.name, protocol.name)
    scored = "support images count in the score" if protocol.score_support else "support images are left out of the score"
    some = "all images" if protocol.images is None else f"the first {protocol.images} images"
    size = f"{protocol.support_size} unlabeled images at a time"
    return f"{how}; {size}; {some} of each domain are predicted, {protocol.predict} the update; {scored}"


def _order(protocol: Protocol) -> tuple[int, str, bool, int]:
    names = list(STREAMS)
    place = names.index(protocol.name) if protocol.name in names else len(names)
    return place, protocol.predict, not protocol.score_support, protocol.support_size


def _scores(trials: Iterable[Trial], settings: str) -> list[float]:
    return _known(trial.score for trial in trials if trial.settings == settings)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _minus(first: float | None, second: float | None) -> float:
    return np.nan if first is None or second is None else first - second


@dataclass(frozen=True)
class Unit:
    """How numbers of a metric are written: fractions in percent, other values as they are."""

    metric: str
    percent: bool

    @property
    def name(self) -> str:
        """What a column of them is headed by."""
        return f"{self.metric}, %" if self.percent else self.metric

    @property
    def of_differences(self) -> str:
        return " points" if self.percent else ""

    def number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"

    def signed(self, value: float) -> str:
        """With a true minus sign."""
        text = f"{100 * value:+.1f}" if self.percent else f"{value:+.3f}"
        return text.replace("-", "\N{MINUS SIGN}")

    def spread(self, value: Spread | None) -> str:
        if value is None:
            return MISSING
        deviation = "" if value.deviation is None else f" ± {self.number(value.deviation)}"
        return f"{self.number(value.mean)}{deviation}"

    def interval(self, value: Difference | None) -> str:
        """``+6.2 (+5.6 to +6.8)``."""
        if value is None:
            return MISSING
        if value.low is None or value.high is None:
            return self.signed(value.mean)
        return f"{self.signed(value.mean)} ({self.signed(value.low)} to {self.signed(value.high)})"


def unit_of(results: Results) -> Unit:
    return Unit(results.tests[0].metric, percent=results.tests[0].unit == "fraction")


def headline(comparison: Comparison) -> list[str]:
    """What the numbers say, in a sentence or a few."""
    unit, ours = unit_of(comparison.results), comparison.ours
    line = next((line for line in comparison.lines if line.name == ours), None)
    where = (
        f"{counted(len(comparison.domains), 'domain')} of {comparison.results.dataset} ({counted(len(comparison.seeds), 'seed')})"
    )
    if line is None or line.mean is None:
        best = comparison.lines[0]
        if comparison.is_alone:
            return [f"A network trained alone ({best.name}) reaches {_with_unit(unit, best.mean)} on {where}, unadapted."]
        return [f"{best.name} is best on {where}: {_with_unit(unit, best.mean)}."]
    unseen = where.replace("domain", f"{comparison.results.tests[0].split} domain", 1)
    said = [f"{'The adapted student' if ours == 'adapted' else ours} reaches {_with_unit(unit, line.mean)} on {unseen}."]
    baseline, other = comparison.baseline, comparison.best_other
    to_baseline, to_other = comparison.ours_to(baseline), comparison.ours_to(other)
    if baseline is not None and to_baseline is not None:
        said.append(f"{_verdict(unit, to_baseline)} {baseline}{', also the best other method' if baseline == other else ''}.")
    if other not in (None, baseline) and to_other is not None:
        said.append(f"{_verdict(unit, to_other)} the best other method, {other}.")
    return said


def is_first(comparison: Comparison) -> str:
    """Whether ours is first by more than the interval."""
    ours, other = comparison.ours, comparison.best_other
    difference = comparison.ours_to(other)
    if ours is None or other is None or difference is None:
        return ""
    text = unit_of(comparison.results).interval(difference)
    if difference.low is None:
        return f"{ours} minus the best other method, {other}: {text}; too few seeds and domains for an interval."
    if difference.is_clear and difference.mean > 0:
        return f"{ours} is first by more than the interval: {text} against the best other method, {other}."
    if difference.is_clear:
        return f"{ours} is not first: {text} against the best other method, {other}."
    return f"{ours} is not first by more than the interval: {text} against the best other method, {other}."


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def _verdict(unit: Unit, difference: Difference) -> str:
    size = f"{unit.number(abs(difference.mean))}{unit.of_differences}"
    way = "above" if difference.mean > 0 else "below"
    if difference.low is None or difference.high is None:
        return f"That is {size} {way}" if difference.mean else "That is level with"
    interval = f"95 % interval {unit.signed(difference.low)} to {unit.signed(difference.high)}"
    if not difference.is_clear:
        return f"With {unit.signed(difference.mean)}{unit.of_differences} ({interval}) it cannot be told apart from"
    return f"That is {size} ({interval}) {way}"


def _with_unit(unit: Unit, value: Spread | None) -> str:
    return f"{unit.spread(value)} % {unit.metric}" if unit.percent else f"{unit.metric} = {unit.spread(value)}"
