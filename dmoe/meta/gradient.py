"""The bi-level mathematics: inner steps on unlabeled support images, and the exact outer gradient through them.

Everything is a pure function of tensors. Notation: theta, the student's feature parameters, and w, its head's, are
dictionaries of tensors; ``features(theta, images)`` gives ``[B, D]`` and ``head(w, features)`` gives ``[B, K]``; the target t
is ``[S, D]`` for S support images. Source: Zhong et al. 2022, algorithm 1.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = Mapping[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
GradientMethod = Literal["forward_over_reverse", "double_backward"]
InnerLoss = Literal["mean_square", "norm"]


class MetaGradient(NamedTuple):
    """The outer loss of one episode and its exact gradients.

    Attributes:
        loss: outer loss, a scalar.
        inner_loss: the inner loss before the first inner step, a scalar.
        theta: gradient by each feature parameter.
        w: gradient by each head parameter.
        target: gradient by the target, ``[S, D]``; its vector-Jacobian product with the aggregator is phi's gradient.
        logits: logits of the query images after adapting, ``[Q, K]``, detached.
    """

    loss: Tensor
    inner_loss: Tensor
    theta: dict[str, Tensor]
    w: dict[str, Tensor]
    target: Tensor
    logits: Tensor


def distillation_loss(features: Tensor, target: Tensor, kind: InnerLoss = "mean_square") -> Tensor:
    """L_in: the squared difference, averaged over all B x D entries; or its length, averaged over the B images.

    Raises:
        ValueError: the two have different shapes.
    """
    if features.shape != target.shape:
        raise ValueError(f"features {list(features.shape)} and target {list(target.shape)} must have one shape")
    if kind == "norm":
        length: Tensor = torch.linalg.vector_norm(features - target, dim=1).mean()
        return length
    return (features - target).square().mean()


def inner_step(
    features: Apply, theta: Params, images: Tensor, target: Tensor, inner_lr: float, inner_loss: InnerLoss = "mean_square"
) -> tuple[dict[str, Tensor], Tensor]:
    """One gradient step on L_in: the new parameters and the loss before the step."""
    gradient, loss = grad_and_value(lambda p: distillation_loss(features(p, images), target, inner_loss))(dict(theta))
    return {name: value - inner_lr * gradient[name] for name, value in theta.items()}, loss


def adapted_parameters(
    features: Apply,
    theta: Params,
    images: Tensor,
    target: Tensor,
    *,
    inner_lr: float,
    inner_steps: int = 1,
    inner_loss: InnerLoss = "mean_square",
) -> dict[str, Tensor]:
    """theta after ``inner_steps`` steps towards ``target``; no graph is kept."""
    adapted = {name: value.detach() for name, value in theta.items()}
    for _ in range(inner_steps):
        adapted, _ = inner_step(features, adapted, images, target.detach(), inner_lr, inner_loss)
    return adapted


def meta_gradient(
    *,
    features: Apply,
    head: Apply,
    loss: Loss,
    theta: Params,
    w: Params,
    target: Tensor,
    support: Tensor,
    query: Tensor,
    labels: Tensor,
    inner_lr: float,
    inner_steps: int = 1,
    inner_loss: InnerLoss = "mean_square",
    method: GradientMethod = "forward_over_reverse",
) -> MetaGradient:
    """The outer loss on the query images after adapting to the support images, with its second-order gradients.

    Both methods give the same numbers up to rounding. ``forward_over_reverse`` keeps no graph of the inner steps; the
    other keeps it and needs no forward-mode derivatives of the network's operators.

    Args:
        loss: ``(logits [Q, K], labels [Q]) -> scalar``.
        target: t of the support images ``[S, D]``; whatever graph it carries is left alone.
        inner_lr: step size of the inner steps.
        inner_steps: how many, at least 1.
    """
    run = _forward_over_reverse if method == "forward_over_reverse" else _double_backward
    theta = {name: value.detach() for name, value in theta.items()}
    w = {name: value.detach() for name, value in w.items()}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither a second derivative nor a forward mode
        return run(
            _Episode(features, head, loss, theta, w, target.detach(), support, query, labels, inner_lr, inner_steps, inner_loss)
        )


class _Episode(NamedTuple):
    features: Apply
    head: Apply
    loss: Loss
    theta: Params
    w: Params
    target: Tensor
    support: Tensor
    query: Tensor
    labels: Tensor
    inner_lr: float
    inner_steps: int
    inner_loss: InnerLoss


def _forward_over_reverse(episode: _Episode) -> MetaGradient:
    """Back through the inner steps by Hessian-vector products.

    With theta_0 = theta, theta_{k+1} = theta_k - lr * dL_in/dtheta_k and v_K = dL_out/dtheta_K, one forward-over-reverse pass
    at theta_k in direction v_{k+1} gives both H v, by which v_k = v_{k+1} - lr * H v, and J v, the tangent of the features f,
    by which dL_out/dt grows by -lr * (d2 L_in / dt df) J v: for the mean square, lr * 2 / (S * D) * J v.
    """
    features, head, loss, theta, w, target, support, query, labels, inner_lr, inner_steps, kind = episode
    path: list[Params] = [theta]
    inner_losses: list[Tensor] = []
    for _ in range(inner_steps):
        stepped, inner_loss = inner_step(features, path[-1], support, target, inner_lr, kind)
        path.append(stepped)
        inner_losses.append(inner_loss)

    def outer(p: Params, q: Params) -> tuple[Tensor, Tensor]:
        logits = head(q, features(p, query))
        return loss(logits, labels), logits

    (v, w_gradient), (outer_loss, logits) = grad_and_value(outer, argnums=(0, 1), has_aux=True)(path[-1], w)

    def inner(p: Params) -> tuple[Tensor, Tensor]:
        student = features(p, support)
        return distillation_loss(student, target, kind), student

    def pull(student: Tensor) -> Tensor:
        """dL_in/dt."""
        gradient: Tensor = grad(lambda t: distillation_loss(student, t, kind))(target)
        return gradient

    target_gradient = torch.zeros_like(target)
    for point in reversed(path[:-1]):
        passed = jvp(grad(inner, has_aux=True), (dict(point),), (v,))
        (_, student), (hessian_v, jacobian_v) = passed[0], passed[1]
        target_gradient -= inner_lr * jvp(pull, (student,), (jacobian_v,))[1]
        v = {name: value - inner_lr * hessian_v[name] for name, value in v.items()}
    return MetaGradient(outer_loss, inner_losses[0], v, w_gradient, target_gradient, logits.detach())


def _double_backward(episode: _Episode) -> MetaGradient:
    """The whole episode as one graph, differentiated by autograd."""
    features, head, loss, theta, w, target, support, query, labels, inner_lr, inner_steps, kind = episode
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    head_leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    t = target.clone().requires_grad_()
    point: dict[str, Tensor] = leaves
    inner_losses: list[Tensor] = []
    for _ in range(inner_steps):
        inner_loss = distillation_loss(features(point, support), t, kind)
        gradients = torch.autograd.grad(inner_loss, list(point.values()), create_graph=True, materialize_grads=True)
        point = {name: value - inner_lr * g for (name, value), g in zip(point.items(), gradients, strict=True)}
        inner_losses.append(inner_loss.detach())
    logits = head(head_leaves, features(point, query))
    outer_loss = loss(logits, labels)
    wanted = [*leaves.values(), *head_leaves.values(), t]
    *found, dt = torch.autograd.grad(outer_loss, wanted, materialize_grads=True)
    return MetaGradient(
        loss=outer_loss.detach(),
        inner_loss=inner_losses[0],
        theta=dict(zip(leaves, found, strict=False)),
        w=dict(zip(head_leaves, found[len(leaves) :], strict=True)),
        target=dt,
        logits=logits.detach(),
    )
