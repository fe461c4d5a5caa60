"""Grouped products against one product after the other, and their derivatives against finite differences."""

import pytest
import torch
from torch import Tensor

from dmoe.models.sparse.grouped import grouped_linear

SIZES = [3, 0, 4, 1]


def parts(*, biases: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    made = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((8, 3), (4, 3, 5), (4, 5))]
    return made[0], made[1], made[2] if biases else None


def one_by_one(rows: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    each = [those @ weights[expert] for expert, those in enumerate(rows.split(SIZES))]
    if biases is not None:
        each = [made + biases[expert] for expert, made in enumerate(each)]
    return torch.cat(each)


def ours(*tensors: Tensor | None) -> Tensor:
    rows, weights, biases = tensors
    assert rows is not None and weights is not None
    return grouped_linear(rows, weights, biases, SIZES)


def given(tensors: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("biases", [True, False])
def test_product_and_gradients_of_one_product_after_the_other(biases: bool) -> None:
    tensors = parts(biases=biases)
    made, expected = ours(*tensors), one_by_one(*tensors)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(found.sin().sum(), given(tensors)) for found in (made, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert not gradients[0][1][1].any()  # a group without rows


@pytest.mark.parametrize("biases", [True, False])
def test_first_and_second_derivatives_backward_and_forward_against_finite_differences(biases: bool) -> None:
    tensors = parts(biases=biases)

    def curved(*some: Tensor) -> Tensor:
        return ours(*some, *([] if biases else [None])).sin()

    assert torch.autograd.gradcheck(curved, given(tensors), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(curved, given(tensors), check_fwd_over_rev=True)


def test_derivative_of_a_gradient_by_functions_of_torch() -> None:
    tensors = given(parts())
    direction = tuple(torch.randn_like(tensor) for tensor in tensors)

    def moved(product):
        def loss(*some: Tensor) -> Tensor:
            return product(*some).sin().sum()

        return torch.func.jvp(torch.func.grad(loss, argnums=(0, 1, 2)), tensors, direction)[1]

    for one, other in zip(moved(ours), moved(one_by_one), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    rows, weights, biases = parts()
    made = grouped_linear(rows.detach(), weights.detach(), biases, SIZES)
    made.sum().backward()
    assert rows.grad is None and weights.grad is None
    assert biases is not None and biases.grad is not None
    assert biases.grad[:, 0].tolist() == SIZES


def test_autocast_takes_its_precision_and_leaves_double_alone() -> None:
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        tensors = parts(dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = ours(*tensors)
        assert made.dtype == expected
        made.float().sum().backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == dtype for tensor in given(tensors))
        torch.testing.assert_close(made.to(dtype), one_by_one(*tensors), rtol=0.05, atol=0.05)
