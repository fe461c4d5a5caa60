"""One method of a comparison on one seed: settings are chosen on validation domains, then it is tested by every protocol."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmoe.artifacts import write_json_lines
from dmoe.compare.candidates import CANDIDATES, FULL, OURS, Candidate, Trial
from dmoe.compare.choice import Choice, choice_of, choose, rows_of, seconds_of
from dmoe.config import Duration
from dmoe.console import say
from dmoe.errors import DoesNotApply
from dmoe.evaluation import Evaluation, Method, judged
from dmoe.memory import peak_bytes
from dmoe.protocols import KINDS, Protocol
from dmoe.run import Run
from dmoe.run_folder import Stage, versions
from dmoe.testing import finite

ROWS = "rows.jsonl"

TIMED_IMAGES = 500
"""Predicted at a time, where predictions a second are counted."""


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
    facts |= {"sparse": candidate.sparse.model_dump(mode="json")} if candidate.sparse else {}
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
        write_json_lines(stage.folder / ROWS, rows)
        figures = {"cpu_seconds": round(time.process_time() - began, 1), "chosen": dict(choice.settings), "steps": choice.steps}
        stage.finish(files=[stage.folder / ROWS], figures=figures)
    say(f"{stage.name}: {candidate.name}: {len(rows)} results ({stage.folder})")


def _compared(run: Run, stage: Stage, key: str, candidate: Candidate, chosen_by: Path) -> tuple[list[dict[str, Any]], Choice]:
    trial = Trial(candidate.seen(run), stage)
    already = sum(seconds_of(run, name) for name in candidate.beside)
    rows: list[dict[str, Any]] = []
    if run.folder.path.resolve() == chosen_by.resolve():
        choice, trials = choose(trial, candidate, already=already)
        rows += [_row(run, candidate, "trial") | one.row for one in trials]
    else:
        choice = choice_of(chosen_by, key)
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


def by_every_protocol(run: Run, method: Method, candidate: Candidate) -> Iterator[tuple[Protocol, Evaluation]]:
    """The method on the target domains by every protocol. The first is the main one."""
    main, others = run.protocol, protocols(run)
    # The same predictions, or the same but for which of them count, need not be made again.
    apart = [each for each in others if not candidate.by_image and replace(each, score_support=main.score_support) != main]
    once, *evaluations = run.evaluate_all({"": method}, "target", [main, *apart])[""]
    yield main, once
    for protocol in others:
        if protocol in apart:
            yield protocol, evaluations[apart.index(protocol)]
        else:
            yield protocol, judged(run.dataset, "target", once.predictions, protocol.scored(run.dataset.splits["target"]))


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
