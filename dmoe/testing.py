"""The end of a run: every method on the domains that nobody has seen, as a table, as rows of results, as files of predictions."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.adaptation import Adapter
from dmoe.alone import trained_alone
from dmoe.artifacts import digest_of_file, written_whole
from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.baselines.unadapted import Unadapted
from dmoe.console import say
from dmoe.data.base import DomainDataset
from dmoe.errors import SuspectAdaptation, UserError
from dmoe.evaluation import Evaluation, Method, WithTokens
from dmoe.model import build_adapter, build_aggregator, load_as
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.published import PublishedFolder
from dmoe.run import Run, load_finished
from dmoe.run_folder import versions

DOMAINS_SHOWN = 30
"""A longer table of domains is not printed; results.jsonl has them all."""


@dataclass(frozen=True)
class Trained:
    """What is tested.

    Attributes:
        plain: the student as supervised training left it, to compare with; None where there is none.
        weights: digests of the files, by their names.
    """

    adapter: Adapter
    plain: Student | None
    weights: Mapping[str, str]


def test(run: Run, split: str = "target", *, published: PublishedFolder | None = None) -> None:
    """Evaluate the finished run, or published checkpoints in its place, on a split's domains.

    Writes a table to the console, rows to ``results.jsonl`` and a file of predictions a method.

    Raises:
        UserError: there is no such split, or something of the run is missing.
    """
    if split not in run.dataset.splits:
        raise UserError(f"--split: {run.dataset.name} has no {split} split; it has {', '.join(run.dataset.splits)}")
    began = time.perf_counter()
    methods: dict[str, Method | WithTokens] = {}
    weights: Mapping[str, str]
    if run.config.trains_one:
        methods |= trained_alone(run)
        main, weights = next(iter(methods)), run.student_stage.files()
    else:
        trained = _finished_run(run) if published is None else _published(run, published)
        if trained.plain is not None:
            methods |= {"ERM student": Unadapted(trained.plain), "batch statistics": BatchStatistics(trained.plain)}
        methods |= {"before adapting": Unadapted(trained.adapter.student), "adapted": trained.adapter}
        main, weights = "adapted", trained.weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspectAdaptation)  # told below
        evaluations = {name: found for name, (found,) in run.evaluate_all(methods, split, [run.protocol], name="test").items()}
    if not run.world.is_first:
        return
    settings, dataset = run.config.evaluation, run.dataset
    say(f"\n{split} domains, {_protocol_line(run)}")
    if dataset.unreadable:
        say(f"{len(dataset.unreadable)} images could not be read and are left out; no files of predictions are written")
    say("\n" + overall_table(evaluations, dataset))
    if len(evaluations[main].domains) <= DOMAINS_SHOWN:
        say("\n" + domain_table(evaluations, dataset.splits[split].domain_names))
    if evaluations[main].diagnoses:
        say("\n" + watched_lines(evaluations[main], dataset.splits[split].domain_names, told=settings.on_suspect != "keep"))
    for name, evaluation in evaluations.items():
        run.folder.append_result(result_row(run, name, split, evaluation, weights=weights))
        if not run.dataset.unreadable:
            path = run.folder.path / "predictions" / name.replace(" ", "_") / predictions_name(run, split)
            write_predictions(path, evaluation)
    say(f"\ntested in {time.perf_counter() - began:.0f} s; run folder: {run.folder.path}")


def _protocol_line(run: Run) -> str:
    size, scored = run.config.support_size, run.config.evaluation.score_support
    if run.config.trains_one:
        return "unadapted" + ("" if scored else f", the first {size} images of each left out of the score")
    return f"adapted to {size} unlabeled images of each, {'included in' if scored else 'left out of'} the score"


def result_row(
    run: Run, method: str, split: str, evaluation: Evaluation, *, weights: Mapping[str, str], **more: Any
) -> dict[str, Any]:
    """A line of ``results.jsonl``."""
    names = run.dataset.splits[split].domain_names
    if evaluation.diagnoses:
        more["suspect"] = {names[domain]: str(one) for domain, one in evaluation.diagnoses.items() if one.suspect}
    return {
        "method": method,
        "dataset": run.dataset.name,
        "split": split,
        "seed": run.config.seed,
        "replicate": run.dataset.replicate or f"seed:{run.config.seed}",
        "metric": run.dataset.selection_metric,
        "reported": dict(run.dataset.reported),
        "unit": "value" if run.dataset.task.kind == "regression" else "fraction",
        "overall": _plain(evaluation.overall),
        "mean": finite(evaluation.mean),
        "worst": finite(evaluation.worst),
        "domains": {names[domain]: _plain(metrics) for domain, metrics in evaluation.domains.items()},
        "support_size": run.config.support_size,
        "score_support": run.config.evaluation.score_support,
        **more,
        "weights": dict(weights),
        "config": run.config.model_dump(mode="json"),
        "data": run.dataset.fingerprint,
        "versions": versions(),
    }


def predictions_name(run: Run, split: str) -> str:
    """The name that the WILDS leaderboard wants a file of predictions to have."""
    dataset = run.dataset
    replicate = dataset.replicate or f"seed:{run.config.seed}"
    official = dataset.official_splits.get(split, split)
    return f"{dataset.official_name or dataset.name}_split:{official}_{replicate}_epoch:best_pred.csv"


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """A prediction a line, in data-set order: class numbers, or values. A file that says the same already is left alone."""
    text = "".join(f"{value!r}\n" for value in evaluation.predictions.tolist())
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def overall_table(evaluations: Mapping[str, Evaluation], dataset: DomainDataset) -> str:
    """A row a method: the data set's metrics over all images, then the headline metric by domain."""
    percent = dataset.task.kind != "regression"
    rows = [["", *dataset.reported.values(), f"mean {dataset.task.headline} of domains", "worst domain"]]
    for name, evaluation in evaluations.items():
        values = [*(evaluation.overall[key] for key in dataset.reported), evaluation.mean, evaluation.worst]
        rows.append([name, *(_number(value, percent=percent) for value in values)])
    return _text(rows, rules=[1])


def domain_table(evaluations: Mapping[str, Evaluation], names: Mapping[int, str]) -> str:
    """A row a domain, a column a method: the headline metric."""
    first = next(iter(evaluations.values()))
    rows = [["domain", *evaluations]]
    for domain in first.domains:
        values = [e.domains[domain][e.headline] for e in evaluations.values()]
        rows.append([names.get(domain, str(domain)), *(_number(value, percent=first.headline == "accuracy") for value in values)])
    return _text(rows, rules=[1])


def watched_lines(evaluation: Evaluation, names: Mapping[int, str], *, told: bool) -> str:
    """How many domains were suspect, and which; where ``told``, a line for each of the first says why."""
    suspect = {names.get(domain, str(domain)): one for domain, one in evaluation.diagnoses.items() if one.suspect}
    among = f"{len(suspect)} of {len(evaluation.diagnoses)} domains suspect"
    lines = [f"adapted: {among}" + (f": {', '.join(list(suspect)[:DOMAINS_SHOWN])}" if suspect else "")]
    if told:
        lines += [f"  {name}: {one}" for name, one in list(suspect.items())[:DOMAINS_SHOWN]]
    return "\n".join(lines)


def _finished_run(run: Run) -> Trained:
    adapter = load_as(run.folder, run.config, device=run.device)
    return Trained(adapter, plain_student(run), run.folder.stage("meta", {}).files())


def plain_student(run: Run) -> Student:
    """The student as supervised training left it.

    Raises:
        UserError: it is missing.
    """
    plain = run.network(run.config.student_backbone, "student", to_train=False)
    if not load_finished(run.student_stage, {"model": plain}):
        raise UserError(f"{run.student_stage.folder}: the pretrained student, to compare with, is missing: run.py makes it")
    return _student(plain, run)


def _published(run: Run, published: PublishedFolder) -> Trained:
    config, task = run.config, run.dataset.task
    experts = [run.network(config.token_backbone, "published", to_train=False) for _ in range(config.experts.count)]
    for number, expert in enumerate(experts):
        published.load_expert(number, expert)
    student = run.network(config.student_backbone, "published", to_train=False)
    published.load_student("meta", student)
    aggregator = build_aggregator(config.aggregator, width=student.width, num_outputs=task.num_outputs).to(run.device)
    published.load_aggregator("meta", aggregator)
    adapter = build_adapter(config, task, experts=experts, aggregator=aggregator, student=student, kind=Adapter)
    plain = None
    if published.student_path("pretrained").is_file():
        pretrained = run.network(config.student_backbone, "published", to_train=False)
        published.load_student("pretrained", pretrained)
        plain = _student(pretrained, run)
    paths = [*map(published.expert_path, range(len(experts))), published.student_path("meta"), published.aggregator_path("meta")]
    return Trained(adapter, plain, {path.name: digest_of_file(path) for path in paths})


def _student(network: Network, run: Run) -> Student:
    return Student(features=network.features, head=network.head, task=run.dataset.task)


def finite(value: float) -> float | None:
    """The number, or None: JSON knows no number that is not one."""
    return value if math.isfinite(value) else None


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: finite(value) for key, value in metrics.items()}


def _number(value: float, *, percent: bool) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _text(rows: Sequence[Sequence[str]], *, rules: Sequence[int]) -> str:
    """Columns under one another, the first to the left, with rules before the rows of these numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        if number in rules:
            lines.append("  ".join("-" * width for width in widths))
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
