"""Which way to the meta-gradient, and how many images at a time: what fits into memory, and of that the fastest.

All ways give the same gradient to rounding; on a given machine for a given network one of them costs least. It is found by a few
small trials, and remembered on the machine, so that the same run takes the same way, and ends in the same numbers, again.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from dmoe.artifacts import digest_of_facts, read_json, write_json
from dmoe.errors import UserError
from dmoe.machine import cache_folder, processor
from dmoe.memory import peak_bytes
from dmoe.meta.gradient import GradientMethod
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way

SAFETY = 1.25
"""Memory is counted in tensors; the allocator's gaps and what operators take for a moment come on top."""

CLEARLY = 0.9
"""A way that is more complicated must take less than this part of the time."""

TRIED_IMAGES = 8
"""Of an episode, where all of it would be one graph."""

PATIENCE = 1.0
"""Where a single image takes longer than so many seconds, less is tried."""


@dataclass(frozen=True)
class Choice:
    """A way and what speaks for it.

    Attributes:
        gigabytes: about what an update takes beside the networks and their optimizers; 0 where nothing was tried.
        seconds: about what an episode takes, CPU seconds where there is no GPU; 0 where nothing was tried.
    """

    way: Way
    gigabytes: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        chunks = f", {self.way.chunk_size} images at a time" if self.way.chunk_size else ""
        memory = f", about {self.gigabytes:.1f} GB" if self.gigabytes else ""
        return f"{self.way.method.replace('_', ' ')}{chunks}{memory}"

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Choice":
        """What :func:`dataclasses.asdict` made.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it did not.
        """
        way = Way(**facts["way"])
        sized = way.chunk_size is None or (type(way.chunk_size) is int and way.chunk_size >= 1)
        if way.method not in get_args(GradientMethod) or not sized:
            raise ValueError(f"no way: {way}")
        return cls(way, float(facts["gigabytes"]), float(facts["seconds"]))


def choose(learner: MetaLearner, episode: EpisodeBatch, *, budget: int) -> Choice:
    """The fastest way of those that fit.

    Args:
        learner: its gradients are cleared; its way is left as it was.
        episode: of the size that training has; the values do not matter.
        budget: bytes that an update may take.

    Raises:
        UserError: the student cannot be differentiated twice, or not even one image at a time fits.
    """
    size = max(len(episode.support), len(episode.query))
    whole = _Trial(learner, Way("double_backward"), episode)
    try:
        fixed, each = whole.memory(budget)
    except (NotImplementedError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"student.backbone: it cannot be differentiated twice ({why}): choose another") from error
    best = None
    if fixed + each * size <= budget:
        if whole.slow:  # chunks take a quarter more arithmetic, and with large images nothing else decides
            return Choice(whole.way, (fixed + each * size) / 1e9)
        best = whole.timed(min(size, TRIED_IMAGES), fixed + each * size)

    chunked = _Trial(learner, Way("forward_over_reverse"), episode)
    try:
        fixed, each = chunked.memory(budget)
    except (NotImplementedError, RuntimeError):  # an operator without a forward mode
        chunked = _Trial(learner, Way("reverse_over_reverse"), episode)
        fixed, each = chunked.memory(budget)
    most = min(size, int((budget - fixed) / each))
    if best is None and most < 1:
        raise UserError(
            f"meta.memory_gb: one image at a time takes {(fixed + each) / 1e9:.2f} GB, there are {budget / 1e9:.2f}: "
            "allow more, or take smaller images or a smaller student"
        )
    last = None
    sizes = [2**power for power in range(2, 12) if 2**power < most]
    for chunk_size in [*sizes, most] if most >= 1 else []:
        chunked.way = replace(chunked.way, chunk_size=chunk_size)
        found = chunked.timed(chunk_size, fixed + each * chunk_size)
        if last is not None and found.seconds >= CLEARLY * last.seconds:
            break
        last = found
    if best is None or (last is not None and last.seconds < CLEARLY * best.seconds):
        best = last
    assert best is not None
    return best


def remembered(facts: Mapping[str, Any]) -> Choice | None:
    """What was chosen earlier on this machine for the same network, sizes and budget."""
    path = _note(facts)
    if path is None or not path.is_file():
        return None
    try:
        return Choice.from_facts(read_json(path))
    except (UserError, KeyError, TypeError, ValueError, OverflowError):  # a note that says nothing is as good as none
        return None


def remember(facts: Mapping[str, Any], choice: Choice) -> None:
    """Keep a choice on this machine, where that is possible."""
    path = _note(facts)
    if path is not None:
        write_json(path, {**asdict(choice), "of": _with_machine(facts)})


def _note(facts: Mapping[str, Any]) -> Path | None:
    folder = cache_folder()
    return folder and folder / "gradients" / f"{digest_of_facts(_with_machine(facts))[:32]}.json"


def _with_machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**facts, "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


class _Trial:
    """One way, tried on parts of an episode."""

    def __init__(self, learner: MetaLearner, way: Way, episode: EpisodeBatch) -> None:
        self.way = way
        self._learner, self._episode = learner, episode
        self._device = episode.support.device
        self.slow = False

    def memory(self, budget: int) -> tuple[int, int]:
        """Bytes that an update takes in any case, and for each image at a time, with some to spare.

        Beyond a few images memory is linear in their number; where a few would be too many already, one and two must do.
        """
        self._run(1)  # what is made once and kept, is made
        began = time.perf_counter()
        one = self._peak(1)
        self.slow = time.perf_counter() - began > PATIENCE
        few = (1, 2) if self.slow or SAFETY * 8 * one > budget else (4, 8)
        less, more = (SAFETY * self._peak(count) for count in few)
        each = max(1, int((more - less) / (few[1] - few[0])))
        return max(0, int(more - each * few[1])), each

    def _peak(self, count: int) -> int:
        return peak_bytes(lambda: self._run(count), self._device)

    def timed(self, count: int, memory: int) -> Choice:
        """With the time of an episode, as that of one of ``count`` support images tells it: CPU seconds where there is no GPU."""
        began = self._clock()
        self._run(count)
        seconds = (self._clock() - began) * len(self._episode.support) / min(count, len(self._episode.support))
        return Choice(self.way, memory / 1e9, seconds)

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()

    def _run(self, count: int) -> None:
        """An episode of ``count`` support images and as many query images in proportion, one at least."""
        e, learner = self._episode, self._learner
        queried = max(1, round(count * len(e.query) / len(e.support))) if count > 2 else count
        queried = min(queried, len(e.query))
        part = EpisodeBatch(e.support[:count], e.tokens[:count], e.query[:queried], e.labels[:queried])
        before, learner.way = learner.way, self.way
        try:
            learner.add_gradients([part])
        finally:
            learner.way = before
            learner.clear_gradients()
