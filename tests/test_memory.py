"""Peak memory is counted: what lives at once, no more and no less."""

import torch
from torch.func import grad

from dmoe.memory import memory_budget, peak_bytes

CPU = torch.device("cpu")


def test_what_was_freed_before_does_not_count() -> None:
    def work() -> None:
        one = torch.ones(1000)
        two = one * 2
        del one, two
        torch.ones(500)

    assert peak_bytes(work, CPU) == 8000


def test_views_count_once() -> None:
    def work() -> list[torch.Tensor]:
        one = torch.ones(10, 100)
        return [one.view(-1), one.t(), one[3], one.detach()]

    assert peak_bytes(work, CPU) == 4000


def test_what_a_graph_holds_counts() -> None:
    x = torch.ones(1000, requires_grad=True)

    def squares(times: int) -> None:
        y = x
        for _ in range(times):
            y = y * y
        y.sum().backward()
        x.grad = None

    assert peak_bytes(lambda: squares(8), CPU) - peak_bytes(lambda: squares(4), CPU) == 4 * 4000


def test_transformed_functions_are_counted_too() -> None:
    counted = peak_bytes(lambda: grad(lambda p: (p * 2).exp().sin().sum())(torch.ones(1000)), CPU)
    assert 3 * 4000 <= counted <= 7 * 4000


def test_the_budget_of_a_machine_is_a_part_of_it_and_the_same_each_time() -> None:
    assert 2**28 < memory_budget(CPU) == memory_budget(CPU)
