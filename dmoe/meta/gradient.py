"""The bi-level mathematics: inner steps on unlabeled support images, and the exact outer gradient through them.

Everything is a pure function of tensors. Notation: theta, the student's feature parameters, and w, its head's, are
dictionaries of tensors; ``features(theta, images)`` gives ``[B, D]`` and ``head(w, features)`` gives ``[B, K]``; the target t
is ``[S, D]`` for S support images, or as wide as what is distilled of them, see :func:`distilled`. psi stands for
``prepare(theta)``: whatever of the network's work depends on theta alone and not on images; without a ``prepare`` it is theta.
Source: Zhong et al. 2022, algorithm 1.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = Mapping[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[Params], dict[str, Tensor]]
GradientMethod = Literal["forward_over_reverse", "reverse_over_reverse", "double_backward"]
InnerLoss = Literal["mean_square", "norm"]
Distill = Literal["features", "logits", "both"]
Told = Callable[[Params, Params, Tensor], Tensor]
"""(psi, w, images) to what is distilled of the student."""


class MetaGradient(NamedTuple):
    """The outer loss of one episode and its exact gradients.

    Attributes:
        loss: outer loss, a scalar.
        inner_loss: the inner loss before the first inner step, a scalar.
        theta: gradient by each feature parameter.
        w: gradient by each head parameter.
        target: gradient by the target, of its shape; its vector-Jacobian product with the aggregator is phi's gradient.
        logits: logits of the query images after adapting, ``[Q, K]``, detached.
    """

    loss: Tensor
    inner_loss: Tensor
    theta: dict[str, Tensor]
    w: dict[str, Tensor]
    target: Tensor
    logits: Tensor


def distilled(features: Tensor, logits: Callable[[Tensor], Tensor], what: Distill = "features") -> Tensor:
    """What an inner step brings together: features ``[B, D]``, their logits ``[B, K]``, or both side by side, ``[B, D + K]``.

    The two are so scaled that a mean square over both is the sum of their mean squares.
    """
    if what == "features":
        return features
    said = logits(features)
    if what == "logits":
        return said
    width = features.shape[1] + said.shape[1]
    return torch.cat([part * math.sqrt(width / part.shape[1]) for part in (features, said)], dim=1)


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
    features: Apply,
    theta: Params,
    images: Tensor,
    target: Tensor,
    inner_lr: float,
    inner_loss: InnerLoss = "mean_square",
    prepare: Prepare = dict,
) -> tuple[dict[str, Tensor], Tensor]:
    """One gradient step on L_in: the new parameters and the loss before the step."""
    stepped, loss, _ = _inner_step(features, theta, images, target, inner_lr, inner_loss, prepare)
    return stepped, loss


def _inner_step(
    features: Apply,
    theta: Params,
    images: Tensor,
    target: Tensor,
    inner_lr: float,
    inner_loss: InnerLoss,
    prepare: Prepare,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """:func:`inner_step`, and the features ``[B, D]`` before it."""

    def loss_of(p: Params) -> tuple[Tensor, Tensor]:
        found = features(prepare(p), images)
        return distillation_loss(found, target, inner_loss), found

    gradient, (loss, found) = grad_and_value(loss_of, has_aux=True)(dict(theta))
    return {name: value - inner_lr * gradient[name] for name, value in theta.items()}, loss, found


def adapted_parameters(
    features: Apply,
    theta: Params,
    images: Tensor,
    target: Tensor,
    *,
    inner_lr: float,
    inner_steps: int = 1,
    inner_loss: InnerLoss = "mean_square",
    prepare: Prepare = dict,
) -> dict[str, Tensor]:
    """theta after ``inner_steps`` steps towards ``target``; no graph is kept."""
    return adapted_from(
        features, theta, images, target, inner_lr=inner_lr, inner_steps=inner_steps, inner_loss=inner_loss, prepare=prepare
    )[0]


def adapted_from(
    features: Apply,
    theta: Params,
    images: Tensor,
    target: Tensor,
    *,
    inner_lr: float,
    inner_steps: int = 1,
    inner_loss: InnerLoss = "mean_square",
    prepare: Prepare = dict,
) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`adapted_parameters`, and the features ``[B, D]`` before the first step, which come of themselves."""
    adapted, before = {name: value.detach() for name, value in theta.items()}, None
    for _ in range(inner_steps):
        adapted, _, found = _inner_step(features, adapted, images, target.detach(), inner_lr, inner_loss, prepare)
        before = found.detach() if before is None else before
    return adapted, features(prepare(adapted), images) if before is None else before


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
    distill: Distill = "features",
    method: GradientMethod = "forward_over_reverse",
    chunk_size: int | None = None,
    prepare: Prepare = dict,
) -> MetaGradient:
    """The outer loss on the query images after adapting to the support images, with its second-order gradients.

    All methods give the same numbers up to rounding. The first two keep no graph of the inner steps, and can take support and
    query images in chunks, so that memory does not grow with their number: every term is a sum over images, as long as the
    network treats each by itself (batch-norm in eval mode does). ``reverse_over_reverse`` does without forward-mode
    derivatives, which some operators lack. ``double_backward`` keeps the whole episode as one graph.

    Args:
        loss: ``(logits [Q, K], labels [Q]) -> scalar``, a mean over images.
        target: t of the support images, what is distilled of the aggregator; whatever graph it carries is left alone.
        inner_lr: step size of the inner steps.
        inner_steps: how many, at least 1; of theta only.
        distill: see :func:`distilled`; other than features, w has a part in the inner steps too, and its gradient says so.
        chunk_size: images at a time; None: all at once. ``double_backward`` takes no chunks.
        prepare: theta to what ``features`` takes in its place, done once for all chunks; must have a forward mode.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    w = {name: value.detach() for name, value in w.items()}

    def told(psi: Params, q: Params, images: Tensor) -> Tensor:
        return distilled(features(psi, images), lambda found: head(q, found), distill)

    episode = _Episode(
        features, head, told, loss, theta, w, target.detach(), support, query, labels, inner_lr, inner_steps, inner_loss, prepare
    )
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither a second derivative nor a forward mode
        if method == "double_backward":
            return _double_backward(episode)
        product = _forward_over_reverse if method == "forward_over_reverse" else _reverse_over_reverse
        known = {} if distill == "features" else w
        return _by_products(episode, product, known, chunk_size or max(len(support), len(query)))


class _Episode(NamedTuple):
    features: Apply
    head: Apply
    told: Told
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
    prepare: Prepare


Product = Callable[[Told, Params, Params, Params, Tensor, Tensor, InnerLoss], tuple[Params, Params, Tensor]]
"""(told, psi, u, w, images, target, inner loss) to (H u, W u, M u): d2 L_in / dpsi2, d2 L_in / dw dpsi and d2 L_in / dt dpsi."""


def _by_products(episode: _Episode, product: Product, known: Params, chunk_size: int) -> MetaGradient:
    """Back through the inner steps by Hessian-vector products, chunk by chunk.

    With theta_0 = theta, theta_{k+1} = theta_k - lr * dL_in/dtheta_k and v_K = dL_out/dtheta_K: v_k = v_{k+1} - lr * H v_{k+1}, and
    dL_out/dt grows by -lr * M v_{k+1}, dL_out/dw by -lr * W v_{k+1}, all at theta_k. Chunks know psi only. H v by theta is the
    tangent, along theta's v and dL_in/dpsi's H u, of the pull-back of dL_in/dpsi through ``prepare``, where u is the tangent of psi
    along v.

    Args:
        known: w where the inner loss depends on it; empty otherwise.
    """
    features, head, told, loss, theta, w, target, support, query, labels, inner_lr, inner_steps, kind, prepare = episode
    chunks = [(images, t, len(images) / len(support)) for images, t in _split(chunk_size, support, target)]

    def pull(p: Params, by_psi: Params) -> dict[str, Tensor]:
        """The gradient by theta of a function of psi whose gradient by psi is given."""
        by_theta: dict[str, Tensor] = vjp(prepare, p)[1](by_psi)[0]
        return by_theta

    path: list[tuple[Params, Params]] = []  # theta_k with dL_in/dpsi there
    inner_losses: list[Tensor] = []
    for _ in range(inner_steps):
        psi, inner_loss, inner_gradient = prepare(theta), target.new_zeros(()), _Sum()
        for images, t, share in chunks:
            part, value = grad_and_value(lambda p, x=images, t=t: distillation_loss(told(p, known, x), t, kind))(psi)
            inner_gradient.add(part, share)
            inner_loss += share * value
        path.append((theta, inner_gradient.total))
        by_theta = pull(theta, inner_gradient.total)
        theta = {name: value - inner_lr * by_theta[name] for name, value in theta.items()}
        inner_losses.append(inner_loss)

    def outer(p: Params, q: Params, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(q, features(p, images))
        return loss(logits, y), logits

    psi, outer_loss, logits, by_psi, w_gradient = prepare(theta), target.new_zeros(()), [], _Sum(), _Sum()
    for images, y in _split(chunk_size, query, labels):
        share = len(images) / len(query)
        (part, by_w), (value, said) = grad_and_value(outer, argnums=(0, 1), has_aux=True)(psi, w, images, y)
        by_psi.add(part, share)
        w_gradient.add(by_w, share)
        outer_loss += share * value
        logits.append(said.detach())
    v = pull(theta, by_psi.total)
    del psi, by_psi, theta, by_theta, part

    target_gradient = torch.zeros_like(target)
    while path:
        theta, by_psi_there = path.pop()
        prepared = jvp(prepare, (theta,), (v,))
        psi, u = prepared[0], prepared[1]
        hessian_u = _Sum()
        for (images, t, share), rows in zip(chunks, target_gradient.split(chunk_size), strict=True):
            part, by_w, by_target = product(told, psi, u, known, images, t, kind)
            hessian_u.add(part, share)
            if known:
                w_gradient.add(by_w, -inner_lr * share)
            rows.sub_(inner_lr * share * by_target)
        del psi, u, prepared, part
        hessian_v = jvp(pull, (theta, by_psi_there), (v, hessian_u.total))[1]
        v = {name: value - inner_lr * hessian_v[name] for name, value in v.items()}
    return MetaGradient(outer_loss, inner_losses[0], v, w_gradient.total, target_gradient, torch.cat(logits))


def _forward_over_reverse(
    told: Told, psi: Params, u: Params, w: Params, images: Tensor, target: Tensor, kind: InnerLoss
) -> tuple[Params, Params, Tensor]:
    """One forward-mode pass through the reverse pass: H u, W u, and J u, the tangent of what is told.

    M u is the tangent of dL_in/dt along J u.
    """

    def inner(p: Params, q: Params) -> tuple[Tensor, Tensor]:
        found = told(p, q, images)
        return distillation_loss(found, target, kind), found

    def by_target(found: Tensor) -> Tensor:
        """dL_in/dt."""
        gradient: Tensor = grad(lambda t: distillation_loss(found, t, kind))(target)
        return gradient

    passed = jvp(lambda p: grad(inner, argnums=(0, 1), has_aux=True)(p, dict(w)), (dict(psi),), (dict(u),))
    (_, found), ((hessian_u, w_u), jacobian_u) = passed[0], passed[1]
    return hessian_u, w_u, jvp(by_target, (found,), (jacobian_u,))[1]


def _reverse_over_reverse(
    told: Told, psi: Params, u: Params, w: Params, images: Tensor, target: Tensor, kind: InnerLoss
) -> tuple[Params, Params, Tensor]:
    """The gradient of <dL_in/dpsi, u> by psi, by w and by t."""
    leaves = {name: value.clone().requires_grad_() for name, value in psi.items()}
    w_leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    t = target.clone().requires_grad_()
    inner_loss = distillation_loss(told(leaves, w_leaves, images), t, kind)
    gradients = torch.autograd.grad(inner_loss, list(leaves.values()), create_graph=True, materialize_grads=True)
    along = torch.stack([(g * u[name]).sum() for name, g in zip(leaves, gradients, strict=True)]).sum()
    wanted = [*leaves.values(), *w_leaves.values(), t]
    *found, mixed_u = torch.autograd.grad(along, wanted, materialize_grads=True)
    return dict(zip(leaves, found, strict=False)), dict(zip(w_leaves, found[len(leaves) :], strict=True)), mixed_u


def _split(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


class _Sum:
    """A weighted sum of dictionaries of tensors."""

    total: dict[str, Tensor]

    def __init__(self) -> None:
        self.total = {}

    def add(self, part: Params, share: float) -> None:
        if not self.total:
            self.total = {name: value if share == 1 else share * value for name, value in part.items()}
            return
        for name, value in self.total.items():
            value.add_(part[name], alpha=share)


def _double_backward(episode: _Episode) -> MetaGradient:
    """The whole episode as one graph, differentiated by autograd."""
    features, head, told, loss, theta, w, target, support, query, labels, inner_lr, inner_steps, kind, prepare = episode
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    head_leaves = {name: value.clone().requires_grad_() for name, value in w.items()}
    t = target.clone().requires_grad_()
    point: dict[str, Tensor] = leaves
    inner_losses: list[Tensor] = []
    for _ in range(inner_steps):
        inner_loss = distillation_loss(told(prepare(point), head_leaves, support), t, kind)
        gradients = torch.autograd.grad(inner_loss, list(point.values()), create_graph=True, materialize_grads=True)
        point = {name: value - inner_lr * g for (name, value), g in zip(point.items(), gradients, strict=True)}
        inner_losses.append(inner_loss.detach())
    logits = head(head_leaves, features(prepare(point), query))
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
