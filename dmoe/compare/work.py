"""One method of a comparison on one seed: settings are chosen on validation domains, then it is tested by every protocol."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dmoe.artifacts import read_json, written_whole
from dmoe.compare.candidates import CANDIDATES, FULL, OURS, Candidate, Settings, Trial
from dmoe.config import Duration
from dmoe.console import say
from dmoe.errors import DoesNotApply, UserError
from dmoe.evaluation import Evaluation, Method, judged
from dmoe.memory import peak_bytes
from dmoe.protocols import KINDS, Protocol
from dmoe.run_folder import RunFolder, Stage, versions
from dmoe.stages import Run
from dmoe.testing import finite

ROWS = "rows.jsonl"

TIMED_IMAGES = 500
"""Predicted at a time, where predictions a second are counted."""


@dataclass(frozen=True)
class Choice:
    """What was found on the validation domains, for all seeds.

    Attributes:
        settings: the best of those that were tried.
        steps: of a training that takes as much CPU time as all stages of a run together; 0 where nothing is trained.
    """

    settings: Settings
    steps: int


def compare_one(run: Run, key: str, *, chosen_by: Path) -> None:
    """Try, train and test the method, unless that is finished; leaves ``compare/KEY/rows.jsonl`` in the run folder.

    Args:
        key: of :data:`~dmoe.compare.candidates.CANDIDATES`.
        chosen_by: the run folder of the first seed, which tries settings for all of them; or ``results.jsonl`` of an earlier
            comparison, whose settings and lengths of training are taken.

    Raises:
        UserError: something of the run is missing, or the choice is.
    """
    candidate = CANDIDATES[key]
    config = run.config.compare
    facts = run.facts(*OURS, compare=config.model_dump(mode="json", exclude={"methods"}), method=key)
    facts |= {"tried": [dict(one) for one in candidate.tried], "made_from": made_from(run)}
    stage = run.folder.stage(f"compare/{key}", facts)
    with stage.alone():
        if stage.finished() is not None:
            say(f"{stage.name}: already finished from the same inputs ({stage.folder})")
            return
        began = time.process_time()
        try:
            rows, choice = _compared(run, stage, key, candidate, chosen_by)
        except DoesNotApply as error:
            say(f"{stage.name}: left out: {error}")
            rows, choice = [], Choice({}, 0)
        with written_whole(stage.folder / ROWS) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        figures = {"cpu_seconds": round(time.process_time() - began, 1), "chosen": dict(choice.settings), "steps": choice.steps}
        stage.finish(files=[stage.folder / ROWS], figures=figures)
    say(f"{stage.name}: {candidate.name}: {len(rows)} results ({stage.folder})")


def _compared(run: Run, stage: Stage, key: str, candidate: Candidate, chosen_by: Path) -> tuple[list[dict[str, Any]], Choice]:
    trial = Trial(candidate.seen(run), stage)
    already = sum(seconds_of(run, name) for name in candidate.beside)
    rows: list[dict[str, Any]] = []
    if run.folder.path.resolve() == chosen_by.resolve():
        choice, trials = choose(trial, candidate, already=already)
        rows += [_row(run, candidate, "trial") | facts for facts in trials]
    else:
        choice = _choice_of(chosen_by, key)
    final = replace(trial, name=FULL, duration=Duration(choice.steps, "steps"))
    method = candidate.make(final, choice.settings)
    trained = (final.training_seconds or 0.0) + already
    cost = {"training_cpu_seconds": round(trained, 1), **costs(trial.run, method)}
    for protocol, evaluation in by_every_protocol(trial.run, method, candidate):
        rows.append(
            _row(run, candidate, "test")
            | _test_facts(run, protocol, evaluation)
            | {"settings": dict(choice.settings), "steps": choice.steps, "cost": cost}
        )
    return rows, choice


def choose(trial: Trial, candidate: Candidate, *, already: float) -> tuple[Choice, list[dict[str, Any]]]:
    """The settings that score best on the validation domains, by the main protocol, and all that were tried.

    Args:
        already: CPU seconds of training that the method goes on from.
    """
    run, config = trial.run, trial.run.config.compare
    steps = _trial_steps(trial, candidate)
    found: list[dict[str, Any]] = []
    paces: list[float] = []
    for number, settings in enumerate(candidate.tried[: config.trials]):
        one = replace(trial, name=f"trial_{number}", duration=Duration(steps, "steps"))
        method = candidate.make(one, settings)
        score = run.evaluate(method, "validation", run.protocol).score
        found.append({"trial": number, "settings": dict(settings), "split": "validation", "score": finite(score)})
        say(f"{trial.stage.name}: {json.dumps(dict(settings))}: {score:.4f} on validation")
        if one.training_seconds is not None:
            paces.append(one.training_seconds / steps)
    best = max(found, key=lambda facts: -math.inf if facts["score"] is None else float(facts["score"]))
    full = max(1, round((budget(run) - already) / statistics.median(paces))) if paces else 0
    return Choice(best["settings"], full), found


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


def _choice_of(chosen_by: Path, key: str) -> Choice:
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


def by_every_protocol(run: Run, method: Method, candidate: Candidate) -> Iterator[tuple[Protocol, Evaluation]]:
    """The method on the target domains by every protocol. The first is the main one."""
    main = run.protocol
    split = run.dataset.splits["target"]
    once = run.evaluate(method, "target", main)
    yield main, once
    for protocol in protocols(run):
        alike = candidate.by_image or replace(protocol, score_support=main.score_support) == main
        if alike:  # the same predictions, or the same but for which of them count
            yield protocol, judged(run.dataset, "target", once.predictions, protocol.scored(split))
        else:
            yield protocol, run.evaluate(method, "target", protocol)


def protocols(run: Run) -> list[Protocol]:
    """All but the main one."""
    main, config, split = run.protocol, run.config.compare, run.dataset.splits["target"]
    domains, size = list(split.members), main.support_size
    others = {domain: domains[(number + 1 + len(domains) // 3) % len(domains)] for number, domain in enumerate(domains)}
    found = [replace(main, score_support=not main.score_support)]
    found += [replace(main, support_size=each) for each in config.support_sizes if each != size]
    found += [replace(main, support_from=others)] if len(domains) > 1 else []
    batches = Protocol(size, images=config.stream_images)
    found += [replace(batches, kind=kind) for kind in KINDS if kind != main.kind]
    found += [replace(batches, kind="continual", predict="before")]
    fits = max(len(members) for members in split.members.values())
    return [
        protocol for protocol in found if protocol.score_support or protocol.kind != "per domain" or fits > protocol.support_size
    ]


def budget(run: Run) -> float:
    """CPU seconds of all stages of a run together: what each method may be trained for."""
    return sum(seconds_of(run, stage) for stage in OURS)


def seconds_of(run: Run, stage: str) -> float:
    """CPU seconds of a stage, by its manifest, or the manifests in it."""
    manifests = sorted((run.folder.path / stage).glob("**/manifest.json"))
    return sum(float(read_json(manifest)["figures"]["cpu_seconds"]) for manifest in manifests)


def costs(run: Run, method: Method) -> dict[str, float]:
    """What adapting to a batch takes, and how fast the adapted student predicts, on this machine."""
    split = run.dataset.splits["target"]
    members = next(iter(split.members.values()))
    support = split.images(members[: run.protocol.support_size]).to(run.device)
    images = split.images(members[:TIMED_IMAGES]).to(run.device)
    student = method.adapt(support)
    adapting = [_seconds(lambda: method.adapt(support), run.device) for _ in range(5)]
    student.logits(images[:8])
    predicting = [_seconds(lambda: student.logits(images), run.device) for _ in range(3)]
    return {
        "adapt_ms": round(1e3 * statistics.median(adapting), 2),
        "predictions_per_second": round(len(images) / statistics.median(predicting), 1),
        "peak_mb": round(peak_bytes(lambda: method.adapt(support), run.device) / 1e6, 2),
    }


def _seconds(work: Any, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def made_from(run: Run) -> dict[str, Any]:
    """Digests of the networks that the method is given."""
    return {name: run.folder.stage(name, {}).files() for name in ("student", "meta")}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """What :func:`compare_one` left."""
    return rows_of(folder / ROWS)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Results, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(run: Run, candidate: Candidate, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "method": candidate.name,
        "paper": candidate.paper,
        "dataset": run.dataset.name,
        "seed": run.config.seed,
        "run": run.folder.path.name,
        "data": run.dataset.fingerprint,
    }


def _test_facts(run: Run, protocol: Protocol, evaluation: Evaluation) -> dict[str, Any]:
    names = run.dataset.splits["target"].domain_names
    return {
        "split": "target",
        "protocol": protocol.kind if protocol.support_from is None else "support from another domain",
        "support_size": protocol.support_size,
        "score_support": protocol.score_support,
        "predict": protocol.predict,
        "images": protocol.images,
        "metric": run.dataset.selection_metric,
        "unit": "value" if run.dataset.task.kind == "regression" else "fraction",
        "overall": {run.dataset.selection_metric: finite(evaluation.score)},
        "mean": finite(evaluation.mean),
        "worst": finite(evaluation.worst),
        "domains": {names[domain]: finite(metrics[evaluation.headline]) for domain, metrics in evaluation.domains.items()},
        "versions": versions(),
    }


def order_of(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of several runs as a comparison keeps them: by method, then seed, then as they were made."""
    place = {candidate.name: number for number, candidate in enumerate(CANDIDATES.values())}
    return sorted(rows, key=lambda row: (place[row["method"]], row["seed"]))
