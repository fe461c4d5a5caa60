"""Products of groups of rows, each with a matrix of its own, into one tensor.

``torch.nn.functional.grouped_mm`` is that without double precision and forward derivatives, which exact meta-gradients need.

Notation: T rows in E groups that lie one behind the other; ``sizes`` says how many rows each has, some perhaps none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear(rows: Tensor, weights: Tensor, biases: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """``rows_e W_e + b_e``: ``[T, d]``, ``[E, d, h]`` and ``[E, h]`` to ``[T, h]``.

    Under autocast in its precision. Derivatives of any order, forward and backward; not under ``vmap``.
    """
    kind = rows.device.type
    if torch.is_autocast_enabled(kind) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        rows, weights = rows.to(dtype), weights.to(dtype)
        biases = None if biases is None else biases.to(dtype)
    made: Tensor = _GroupedLinear.apply(rows, weights, biases, list(sizes))
    return made


# Every output is written into one tensor, whose size does not change from step to step: pieces of many sizes would fill the heap
# with holes. Both products have derivatives that are made of the two.


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weights: Tensor, biases: Tensor | None, sizes: list[int]) -> Tensor:
        made = rows.new_empty(len(rows), weights.shape[2])
        for expert, (those, out) in enumerate(zip(rows.split(sizes), made.split(sizes), strict=True)):
            if biases is None:
                torch.mm(those, weights[expert], out=out)
            else:
                torch.addmm(biases[expert], those, weights[expert], out=out)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, list[int]], output: Tensor) -> None:
        rows, weights, _, ctx.sizes = inputs
        ctx.save_for_backward(rows, weights)
        ctx.save_for_forward(rows, weights)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        of_rows, of_weights, of_biases, _ = ctx.needs_input_grad
        return (
            _GroupedLinear.apply(given, weights.mT, None, ctx.sizes) if of_rows else None,
            _GroupedOuter.apply(rows, given, ctx.sizes) if of_weights else None,
            torch.stack([those.sum(dim=0) for those in given.split(ctx.sizes)]) if of_biases else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, rows: Tensor, weights: Tensor, biases: Tensor | None, _: None) -> Tensor:
        of_rows, of_weights = ctx.saved_tensors
        by_rows: Tensor = _GroupedLinear.apply(rows, of_weights, biases, ctx.sizes)
        by_weights: Tensor = _GroupedLinear.apply(of_rows, weights, None, ctx.sizes)
        return by_rows + by_weights


class _GroupedOuter(torch.autograd.Function):
    """``left_e^T right_e``: ``[T, d]`` and ``[T, h]`` to ``[E, d, h]``."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, sizes: list[int]) -> Tensor:
        made = left.new_empty(len(sizes), left.shape[1], right.shape[1])
        for out, one, other in zip(made, left.split(sizes), right.split(sizes), strict=True):
            torch.mm(one.T, other, out=out)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, list[int]], output: Tensor) -> None:
        left, right, ctx.sizes = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        of_left, of_right, _ = ctx.needs_input_grad
        return (
            _GroupedLinear.apply(right, given.mT, None, ctx.sizes) if of_left else None,
            _GroupedLinear.apply(left, given, None, ctx.sizes) if of_right else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, left: Tensor, right: Tensor, _: None) -> Tensor:
        of_left, of_right = ctx.saved_tensors
        by_left: Tensor = _GroupedOuter.apply(left, of_right, ctx.sizes)
        by_right: Tensor = _GroupedOuter.apply(of_left, right, ctx.sizes)
        return by_left + by_right
