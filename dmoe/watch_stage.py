"""After meta-training: how far the statistics of adapting go in training episodes, so that a model can tell what is unlike them."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dmoe.artifacts import digest_of_facts, digest_of_file, read_json, write_json
from dmoe.config import EvaluationConfig
from dmoe.console import progress_over, say
from dmoe.data.base import DomainSplit
from dmoe.data.streams import stored_images
from dmoe.diagnosis import FALSE_ALARMS, Episodes, Statistics, learned_ranges, summaries
from dmoe.model import RANGES, Model, load_as
from dmoe.models.expert_pool import without_own_expert
from dmoe.randomness import Key, generator
from dmoe.run import Run
from dmoe.run_folder import Stage
from dmoe.tokens import TokenStore

VERSION = 1
"""Raised whenever other statistics are measured, or from other batches."""

BATCHES = 100
"""Of each split, about."""

BATCHES_A_DOMAIN = (2, 8)
"""At least, because the variance within a domain is wanted, and at most."""


def measure_ranges(run: Run, tokens: Mapping[str, TokenStore]) -> None:
    """Measure adapting on batches of source and validation domains, of the run's support size; keep the ranges beside the weights.

    Like tokens, these are a cache: made again by itself where they were made from other inputs.
    """
    made_from = {
        "meta": read_json(run.folder.path / "meta" / "manifest.json")["files"],
        "tokens": {name: read_json(run.folder.path / "tokens" / name / "manifest.json")["key"] for name in tokens},
    }
    measuring = {"images": run.config.support_size, "false_alarms": FALSE_ALARMS, "batches": BATCHES, "version": VERSION}
    stage = run.folder.stage("diagnosis", run.facts(made_from=made_from, measuring=measuring))
    with stage.alone():
        if is_measured(stage):
            say(f"{stage.name}: already finished from the same inputs ({stage.folder})")
            return
        began, cpu_began = time.perf_counter(), time.process_time()
        for path in (stage.manifest, stage.folder / RANGES):
            path.unlink(missing_ok=True)
        # As in training, however the run is tested later.
        model = load_as(run.folder, run.config.model_copy(update={"evaluation": EvaluationConfig()}), device=run.device)
        episodes = {name: _episodes(run, model, name, store) for name, store in tokens.items()}
        found = {name: summaries(batches) for name, batches in episodes.items()}
        ranges = learned_ranges(found.values(), images=run.config.support_size)
        measured = {name: {key: one.to_facts() for key, one in split.items()} for name, split in found.items()}
        write_json(stage.folder / RANGES, {**ranges.to_facts(), "made_from": made_from, "measured": measured})
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        counts = {name: sum(map(len, batches.values())) for name, batches in episodes.items()}
        figures = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "batches": counts}
        stage.finish(files=[stage.folder / RANGES], figures=figures)
    of = ", ".join(f"{counts[name]} batches of {len(episodes[name])} {name} domains" for name in episodes)
    say(f"{stage.name}: ranges of {len(ranges.by_name)} statistics from {of}: {seconds:.0f} s ({stage.folder})")


def is_measured(stage: Stage) -> bool:
    """Whether the stage's ranges are there, whole, and made from the same inputs."""
    path = stage.folder / RANGES
    if not stage.manifest.is_file() or not path.is_file():
        return False
    manifest = read_json(stage.manifest)
    same = digest_of_facts(manifest.get("inputs", {})) == stage.key
    return same and manifest.get("files", {}).get(RANGES) == digest_of_file(path)


def _episodes(run: Run, model: Model, name: str, tokens: TokenStore) -> Episodes:
    """The statistics of adapting to batches of a split's domains; source images without the token of their own expert."""
    split = run.dataset.splits[name]
    drawn = batches_of(split, size=run.config.support_size, key=(run.config.seed, "diagnosis", name))
    found: dict[int, list[Statistics]] = {}
    images = stored_images(split, [index for _, index in drawn], workers=run.workers, device=run.device)
    for domain, index in progress_over(drawn, name=f"ranges, {name}", unit="batch"):
        said = tokens[index]
        if name == "source":
            said = without_own_expert(said, run.own_expert[index], mask=run.config.meta.mask)
        found.setdefault(domain, []).append(model.measure(next(images), tokens=said))
    return found


def batches_of(split: DomainSplit, *, size: int, key: tuple[Key, ...]) -> Sequence[tuple[int, Tensor]]:
    """Image numbers of whole batches, none in two of them, each of one domain; domains that are too small have none.

    A few of each domain; where there are many domains, those of a draw at random.
    """
    least, most = BATCHES_A_DOMAIN
    large = [domain for domain, members in split.members.items() if len(members) >= size]
    order = torch.randperm(len(large), generator=generator(*key, "domains"))[: BATCHES // least].sort().values
    each = min(most, max(least, BATCHES // max(1, len(order))))
    drawn = []
    for domain in (large[number] for number in order.tolist()):
        members = split.members[domain]
        shuffled = members[torch.randperm(len(members), generator=generator(*key, domain))]
        drawn += [(domain, batch) for batch in shuffled.split(size)[:each] if len(batch) == size]
    return drawn
