"""SWAD, against the paper's algorithm on lists of all weights and losses."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from dmoe.objectives import SWAD
from dmoe.tasks import Task

EVERY = 2
"""Steps between losses."""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))


def set_to(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value)


def averaged(weights: Sequence[float], losses: Sequence[float], *, start: int, end: int, tolerance: float) -> float:
    """What SWAD makes of these weights of steps."""
    module = network()
    swad = SWAD(Task("regression", num_outputs=1), network=module, start_patience=start, end_patience=end, tolerance=tolerance)
    for step, weight in enumerate(weights):
        set_to(module, weight)
        swad.stepped(module)
        if (step + 1) % EVERY == 0:
            swad.evaluated(module, losses[step // EVERY])
    swad.settle(module)
    (value,) = {round(float(tensor), 4) for name, tensor in module.state_dict().items() if "num_batches" not in name}
    assert module[1].num_batches_tracked == int(weights[-1]), "counts are those of the last step"
    return value


def window(losses: Sequence[float], *, start: int, end: int, tolerance: float) -> tuple[int, int | None]:
    """Numbers of the losses that the window begins and ends with; None: it does not end."""
    begun = limit = None
    for i in range(len(losses)):
        if begun is None:
            first = i - start + 1
            if first >= 0 and losses[first] == min(losses[first : i + 1]):
                begun, limit, seen = first, tolerance * float(np.mean(losses[first : i + 1])), i
        elif i - seen >= end and min(losses[i - end + 1 : i + 1]) > limit:
            return begun, i - end
    return (begun if begun is not None else int(np.argmin(losses))), None


CASES = [
    ([5, 4, 3, 3.1, 3.2, 3.1, 9, 9, 9, 1], "ends before the first 9, whatever comes later"),
    ([5, 4, 3, 3.1, 3.2, 3.1, 9, 9, 3, 9, 9], "a low loss forgives the high ones before it"),
    ([5, 4, 3, 2, 1], "falls to the end: from the lowest on"),
    ([1, 2, 2, 9, 9, 9], "begins at once"),
]


@pytest.mark.parametrize("losses", [losses for losses, _ in CASES], ids=[name for _, name in CASES])
@pytest.mark.parametrize("more", [0, 1], ids=["", "a step after the last loss"])
def test_window_is_that_of_the_algorithm(losses: list[float], more: int) -> None:
    how = {"start": 3, "end": 3, "tolerance": 1.3}
    weights = [float(3 + step * step % 17) for step in range(EVERY * len(losses) + more)]
    first, last = window(losses, **how)  # type: ignore[arg-type]
    chosen = weights[EVERY * (first + 1) - 1 : None if last is None else EVERY * (last + 1)]
    assert averaged(weights, losses, **how) == pytest.approx(np.mean(chosen), abs=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_window_is_that_of_the_algorithm_for_any_losses(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses = (1 + random.exponential(size=14)).tolist()
    weights = random.integers(0, 100, size=EVERY * 14).astype(float).tolist()
    how = {"start": int(random.integers(1, 4)), "end": int(random.integers(1, 4)), "tolerance": 1 + 0.3 * random.random()}
    first, last = window(losses, **how)
    chosen = weights[EVERY * (first + 1) - 1 : None if last is None else EVERY * (last + 1)]
    assert averaged(weights, losses, **how) == pytest.approx(np.mean(chosen), abs=1e-3)


def test_without_a_step_weights_stay() -> None:
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    SWAD(Task("regression", num_outputs=1), network=module, start_patience=3, end_patience=6, tolerance=1.3).settle(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
