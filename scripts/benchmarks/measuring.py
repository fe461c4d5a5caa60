"""Ways of doing the same work, each in a process of its own, in turn: seconds, and memory as the operating system counts it."""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from dmoe.errors import UserError
from dmoe.machine import processor
from dmoe.precision import Precision

Step = Callable[[], object]
Unit = Literal["CPU seconds", "seconds", "GB", "milliseconds", "a CPU second", "a second", "relative difference"]


@dataclass(frozen=True)
class Place:
    """Where and how steps run. ``bfloat16`` is autocast, on every side."""

    device: str = "cpu"
    threads: int = 2
    precision: Precision = "float32"

    @property
    def at(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.at.type == "cuda"

    @property
    def machine(self) -> dict[str, Any]:
        """What figures have to be told with."""
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else processor()
        facts = {"device": self.device, "name": name, "threads": self.threads, "precision": self.precision}
        return {**facts, "torch": torch.__version__, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "")}


Make = Callable[[Place], Step]
"""Sets up whatever a step needs. It has to be picklable: another process calls it."""


@dataclass(frozen=True)
class Side:
    """One way of doing it, as one process measured it.

    Attributes:
        cpu: seconds of each step, all threads together.
        wall: the same by the clock.
        memory: GB at the peak, above what the process held before its first step; on a GPU, of its memory.
    """

    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    memory: float


def measured(make: Make, repeats: int, place: Place) -> Side:
    """Set up, warm up with one step, then take the time of some."""
    torch.set_num_threads(place.threads)
    device, step = place.at, make(place)
    resting = _rest(device)
    cpu, wall = [], []
    for number in range(repeats + 1):
        cpu_began, began = time.process_time(), time.perf_counter()
        step()
        if place.on_gpu:
            torch.cuda.synchronize(device)
        if number:
            cpu.append(time.process_time() - cpu_began)
            wall.append(time.perf_counter() - began)
    return Side(tuple(cpu), tuple(wall), (_peak(device) - resting) / 1e9)


def in_turn(sides: Mapping[str, Make], *, rounds: int, repeats: int, place: Place) -> dict[str, list[Side]]:
    """Each side in a new process, one after the other, ``rounds`` times over.

    Raises:
        UserError: the system killed a process, most likely for its memory.
    """
    found: dict[str, list[Side]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, make in sides.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    found[name].append(pool.submit(measured, make, repeats, place).result())
                except BrokenProcessPool:
                    raise UserError(f"{name}: its process was killed; most likely this machine has not the memory for it") from None
    return found


@dataclass(frozen=True)
class Criterion:
    """A figure of two sides, and what it has to reach.

    Attributes:
        name: of the row.
        against: the side that ours is compared with; empty: ours is told alone.
        unit: seconds are CPU seconds, on a GPU those of the clock.
        bar: the ratio that is asked for; None: it is only told.
        better: whether a ratio above or below the bar holds; it is baseline / ours for ``above``, else ours / baseline, and the
            other way round where the unit is a rate.
        amount: things a step does, where the unit is a rate.
    """

    name: str
    what: str
    against: Literal["baseline", "bound", ""] = "baseline"
    unit: Literal["seconds", "GB", "milliseconds", "rate", "rate by the clock"] = "seconds"
    bar: float | None = None
    better: Literal["above", "below"] = "above"
    amount: float = 1


def row(criterion: Criterion, sides: Mapping[str, Sequence[Side]], place: Place) -> dict[str, Any]:
    """The criterion's row of the table, and whether it holds."""
    clock = "wall" if place.on_gpu or criterion.unit in ("milliseconds", "rate by the clock") else "cpu"
    values = {name: _values(criterion, measurements, clock) for name, measurements in sides.items()}
    ours = statistics.median(values["ours"])
    facts: dict[str, Any] = {"name": criterion.name, "what": criterion.what, "ours": ours}
    facts["unit"] = _unit(criterion, clock)
    facts["range"] = {name: [min(v), max(v)] for name, v in values.items()}
    facts |= {"baseline": None, "ratio": None, "bar": criterion.bar, "better": criterion.better, "holds": None}
    if criterion.against:
        baseline = statistics.median(values[criterion.against])
        upside_down = (criterion.better == "above") != criterion.unit.startswith("rate")
        ratio = baseline / ours if upside_down else ours / baseline
        facts |= {"baseline": baseline, "against": criterion.against, "ratio": ratio}
        if criterion.bar is not None:
            facts["holds"] = ratio >= criterion.bar if criterion.better == "above" else ratio <= criterion.bar
    if "bound" in sides and clock == "cpu" and criterion.unit == "seconds":
        facts["share_of_bound"] = statistics.median(values["bound"]) / ours
    facts["wall"] = {name: statistics.median(s for m in measurements for s in m.wall) for name, measurements in sides.items()}
    facts["memory"] = {name: max(m.memory for m in measurements) for name, measurements in sides.items()}
    return {**facts, "machine": place.machine}


def told(facts: Mapping[str, Any]) -> str:
    """A row for people."""
    lines = [f"{facts['name']}: {facts['what']}"]
    ours = spread(facts["ours"], facts.get("range", {}).get("ours"))
    if facts["baseline"] is None:
        lines.append(f"ours {ours} {facts['unit']}")
    else:
        against = facts.get("against", "baseline")
        lines.append(f"ours {ours}, {against} {spread(facts['baseline'], facts.get('range', {}).get(against))} {facts['unit']}")
    if "wall" in facts:
        lines[-1] += "; " + ", ".join(f"{n} {s:.3g} s by the clock, {facts['memory'][n]:.2f} GB" for n, s in facts["wall"].items())
    verdict = f"ratio {facts['ratio']:.2f}" if facts["ratio"] is not None and facts["unit"] != "relative difference" else ""
    if facts["bar"] is not None:
        verdict += (
            f"{', ' if verdict else ''}bar {facts['bar']:g} or {facts['better']}: {'holds' if facts['holds'] else 'FALLS SHORT'}"
        )
    if "share_of_bound" in facts:
        verdict += f"{'; ' if verdict else ''}the unavoidable passes alone are {facts['share_of_bound']:.2f} of it"
    return "\n  ".join([*lines, verdict] if verdict else lines)


def spread(value: float, ends: Sequence[float] | None = None) -> str:
    return _short(value) + (f" ({_short(ends[0])} to {_short(ends[1])})" if ends is not None and ends[0] < ends[1] else "")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _values(criterion: Criterion, measurements: Sequence[Side], clock: str) -> list[float]:
    if criterion.unit == "GB":
        return [m.memory for m in measurements]
    seconds = [s for m in measurements for s in getattr(m, clock)]
    if criterion.unit.startswith("rate"):
        return [criterion.amount / s for s in seconds]
    return [1000 * s for s in seconds] if criterion.unit == "milliseconds" else seconds


def _unit(criterion: Criterion, clock: str) -> Unit:
    if criterion.unit == "seconds":
        return "CPU seconds" if clock == "cpu" else "seconds"
    if criterion.unit.startswith("rate"):
        return "a CPU second" if clock == "cpu" else "a second"
    return criterion.unit  # type: ignore[return-value]


def _rest(device: torch.device) -> int:
    """Bytes held now, with what setting up has freed given back; from here on the peak is counted anew."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        with suppress(OSError):  # not every container lets a process do that; the peak then counts from its start
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A figure of this process in bytes, by the operating system; getrusage would count the memory of the parent in."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError("memory is measured by /proc, which this system has not: use Linux, or --device cuda") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
