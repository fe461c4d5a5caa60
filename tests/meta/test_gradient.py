"""The outer gradient against finite differences and against the library ``higher``, in float64."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import higher
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.meta.gradient import (
    Distill,
    GradientMethod,
    InnerLoss,
    MetaGradient,
    adapted_parameters,
    distilled,
    inner_step,
    meta_gradient,
)
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way
from dmoe.models.aggregator import Aggregator
from dmoe.models.folding import Folding
from dmoe.models.networks import Network, build_network
from dmoe.tasks import Task

S, Q, D, K = 5, 4, 6, 3
INNER_LR = 0.5
METHODS = get_args(GradientMethod)
Params = dict[str, Tensor]


def small_network() -> Network:
    """Convolutions, batch-norm that has seen something, ReLU and max pooling; in eval mode."""
    features = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, D, 3, padding=1, bias=False),
        nn.BatchNorm2d(D),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    network = Network(features=features, head=nn.Linear(D, K)).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = 0.2 * torch.randn(module.num_features, dtype=torch.float64)
                module.running_var = 0.5 + torch.rand(module.num_features, dtype=torch.float64)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.3, 0.1)
    return network


class Problem:
    """One episode, and its outer loss written down a second time with nothing but autograd."""

    inner_lr = INNER_LR

    def __init__(self, inner_loss: InnerLoss = "mean_square", distill: Distill = "features") -> None:
        self.inner_loss, self.distill = inner_loss, distill
        torch.manual_seed(1)
        self.network = small_network()
        self.theta = {name: p.detach() for name, p in self.network.features.named_parameters()}
        self.w = {name: p.detach() for name, p in self.network.head.named_parameters()}
        self.target = torch.randn(S, D, dtype=torch.float64)
        self.support = torch.randn(S, 2, 6, 6, dtype=torch.float64)
        self.query = torch.randn(Q, 2, 6, 6, dtype=torch.float64)
        self.labels = torch.tensor([0, 2, 1, 2])
        self.said = torch.randn(S, K, dtype=torch.float64)  # the target's logits

    def features(self, theta: Mapping[str, Tensor], images: Tensor) -> Tensor:
        buffers = dict(self.network.features.named_buffers())
        found: Tensor = functional_call(self.network.features, (dict(theta), buffers), (images,))
        return found

    def head(self, w: Mapping[str, Tensor], features: Tensor) -> Tensor:
        return F.linear(features, w["weight"], w["bias"])

    def gradient(
        self, method: GradientMethod, inner_steps: int, chunk_size: int | None = None, folding: Folding | None = None
    ) -> MetaGradient:
        return meta_gradient(
            features=folding.features if folding else self.features,
            prepare=folding.prepare if folding else dict,
            head=self.head,
            loss=F.cross_entropy,
            theta=self.theta,
            w=self.w,
            target=distilled(self.target, lambda _: self.said, self.distill),
            support=self.support,
            query=self.query,
            labels=self.labels,
            inner_lr=self.inner_lr,
            inner_steps=inner_steps,
            inner_loss=self.inner_loss,
            distill=self.distill,
            method=method,
            chunk_size=chunk_size,
        )

    def outer_loss(self, theta: Params, w: Params, target: Tensor, inner_steps: int) -> float:
        """By plain first-order autograd, for finite differences."""
        for _ in range(inner_steps):
            leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
            difference = self.features(leaves, self.support) - target
            loss = (difference**2).sum() / (S * D) if self.inner_loss == "mean_square" else (difference**2).sum(1).sqrt().sum() / S
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            theta = {name: value - INNER_LR * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
        with torch.no_grad():
            return F.cross_entropy(self.head(w, self.features(theta, self.query)), self.labels).item()


@pytest.fixture
def problem() -> Problem:
    return Problem()


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the size of ``other``."""
    return ((one - other).norm() / other.norm()).item()


def central_difference(function: Callable[[float], float], step: float = 1e-6) -> float:
    return (function(step) - function(-step)) / (2 * step)


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("argument", ["theta", "w", "target"])
@pytest.mark.parametrize("inner_loss", get_args(InnerLoss))
def test_gradient_is_the_slope_of_the_outer_loss(
    inner_loss: InnerLoss, argument: str, method: GradientMethod, inner_steps: int
) -> None:
    problem = Problem(inner_loss)
    values = {"theta": problem.theta, "w": problem.w, "target": {"t": problem.target}}
    found = problem.gradient(method, inner_steps)
    gradient = {"theta": found.theta, "w": found.w, "target": {"t": found.target}}[argument]
    for _ in range(4):
        direction = {name: torch.randn_like(value) for name, value in values[argument].items()}

        def along(step: float, direction: Params = direction) -> float:
            moved = {**values, argument: {name: value + step * direction[name] for name, value in values[argument].items()}}
            return problem.outer_loss(moved["theta"], moved["w"], moved["target"]["t"], inner_steps)

        assert (flat(gradient) @ flat(direction)).item() == pytest.approx(central_difference(along), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_an_independent_library(problem: Problem, method: GradientMethod, inner_steps: int) -> None:
    network, target = problem.network, problem.target.clone().requires_grad_()
    sgd = torch.optim.SGD(network.features.parameters(), lr=INNER_LR)
    with higher.innerloop_ctx(network.features, sgd, copy_initial_weights=False) as (features, inner_sgd):
        for _ in range(inner_steps):
            inner_sgd.step(F.mse_loss(features(problem.support), target))
        logits = network.head(features(problem.query))
        loss = F.cross_entropy(logits, problem.labels)
        *expected, by_target = torch.autograd.grad(loss, [*network.parameters(), target])

    found = problem.gradient(method, inner_steps)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(found.logits, logits.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close([*found.theta.values(), *found.w.values()], expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.target, by_target, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("inner_loss", get_args(InnerLoss))
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("method", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_all_methods_agree_to_rounding_whatever_the_chunks(
    inner_steps: int, method: GradientMethod, chunk_size: int | None, inner_loss: InnerLoss
) -> None:
    problem = Problem(inner_loss)
    one, other = problem.gradient(method, inner_steps, chunk_size), problem.gradient("double_backward", inner_steps)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-13, atol=1e-14)
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-14)
    assert one.inner_loss.item() == pytest.approx(other.inner_loss.item(), rel=1e-14)
    assert distance(flat(one.theta), flat(other.theta)) < 1e-12
    assert distance(flat(one.w), flat(other.w)) < 1e-12
    assert distance(one.target, other.target) < 1e-12


@pytest.mark.parametrize("inner_loss", get_args(InnerLoss))
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_work_on_parameters_alone_can_be_done_beforehand(
    inner_steps: int, method: GradientMethod, chunk_size: int | None, inner_loss: InnerLoss
) -> None:
    problem = Problem(inner_loss)
    folding = Folding(problem.network.features)
    assert folding.pairs == 2
    one, other = problem.gradient(method, inner_steps, chunk_size, folding), problem.gradient("double_backward", inner_steps)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-12, atol=1e-13)
    assert list(one.theta) == list(other.theta)
    assert distance(flat(one.theta), flat(other.theta)) < 1e-11
    assert distance(flat(one.w), flat(other.w)) < 1e-12
    assert distance(one.target, other.target) < 1e-11


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_first_order_shortcut_would_be_far_off(problem: Problem, inner_steps: int) -> None:
    """What these tests can tell apart: the gradient at the adapted parameters is not the one at the initial ones."""
    adapted = adapted_parameters(
        problem.features, problem.theta, problem.support, problem.target, inner_lr=INNER_LR, inner_steps=inner_steps
    )
    leaves = {name: value.clone().requires_grad_() for name, value in adapted.items()}
    loss = F.cross_entropy(problem.head(problem.w, problem.features(leaves, problem.query)), problem.labels)
    shortcut = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])
    assert distance(shortcut, flat(problem.gradient("forward_over_reverse", inner_steps).theta)) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_inner_loss_is_the_mean_square_before_the_first_step(problem: Problem, method: GradientMethod) -> None:
    expected = ((problem.features(problem.theta, problem.support) - problem.target) ** 2).sum().item() / (S * D)
    assert problem.gradient(method, inner_steps=3).inner_loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_no_graph_is_left_and_nothing_is_written_to_the_inputs(problem: Problem, method: GradientMethod) -> None:
    problem.theta = {name: value.requires_grad_() for name, value in problem.theta.items()}
    before = {name: value.clone() for name, value in problem.theta.items()}
    found = problem.gradient(method, inner_steps=2)
    tensors = [found.loss, found.inner_loss, *found.theta.values(), *found.w.values(), found.target, found.logits]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(value.grad is None and torch.equal(value, before[name]) for name, value in problem.theta.items())


def test_an_inner_step_goes_down_the_inner_loss(problem: Problem) -> None:
    stepped, before = inner_step(problem.features, problem.theta, problem.support, problem.target, 0.05)
    _, after = inner_step(problem.features, stepped, problem.support, problem.target, 0.05)
    assert after < before


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_phi_gets_the_slope_of_the_outer_loss(problem: Problem, method: GradientMethod, inner_steps: int) -> None:
    aggregator = Aggregator(width=D, num_outputs=K, depth=2, heads=2, dropout=0.1, output_map=True).double()
    tokens = torch.randn(S, 3, D, dtype=torch.float64)
    settings: dict[str, Any] = {"inner_lr": INNER_LR, "inner_steps": inner_steps, "way": Way(method)}
    learner = MetaLearner(student=problem.network, aggregator=aggregator, task=Task("multiclass", num_outputs=K), **settings)
    learner.add_gradients([EpisodeBatch(problem.support, tokens, problem.query, problem.labels)])
    phi = learner.aggregator_parameters
    start = [parameter.detach().clone() for parameter in phi]

    for _ in range(4):
        direction = [torch.randn_like(parameter) for parameter in phi]

        @torch.no_grad()
        def along(step: float, direction: list[Tensor] = direction) -> float:
            for parameter, value, d in zip(phi, start, direction, strict=True):
                parameter.copy_(value + step * d)
            target = aggregator(tokens)
            with torch.enable_grad():
                return problem.outer_loss(problem.theta, problem.w, target, inner_steps)

        slope = sum(float((p.grad * d).sum()) for p, d in zip(phi, direction, strict=True) if p.grad is not None)
        assert slope == pytest.approx(central_difference(along), rel=1e-6, abs=1e-9)
        assert abs(slope) > 1e-5


class LogitsProblem(Problem):
    """An episode in which logits are distilled, written down with nothing but autograd."""

    inner_lr = 0.1  # three larger steps on two losses would cross a kink of the network for any difference that rounding allows

    def loss_by_hand(
        self, theta: Mapping[str, Tensor], w: Mapping[str, Tensor], target: Tensor, said: Tensor, inner_steps: int
    ) -> Tensor:
        for _ in range(inner_steps):
            found = self.features(theta, self.support)
            loss = ((found @ w["weight"].T + w["bias"] - said) ** 2).sum() / (S * K)
            if self.distill == "both":
                loss = loss + ((found - target) ** 2).sum() / (S * D)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: value - self.inner_lr * g for (name, value), g in zip(theta.items(), gradients, strict=True)}
        return F.cross_entropy(self.head(w, self.features(theta, self.query)), self.labels)

    def values(self) -> dict[str, Params]:
        return {"theta": self.theta, "w": self.w, "target": {"t": self.target}, "said": {"s": self.said}}

    def outer(self, values: dict[str, Params], inner_steps: int) -> Tensor:
        return self.loss_by_hand(values["theta"], values["w"], values["target"]["t"], values["said"]["s"], inner_steps)


def leaves_of(values: Params) -> Params:
    return {name: value.clone().requires_grad_() for name, value in values.items()}


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distill", ["logits", "both"])
def test_gradient_where_logits_are_distilled_is_that_of_autograd(
    distill: Distill, method: GradientMethod, inner_steps: int
) -> None:
    problem = LogitsProblem(distill=distill)
    values = {name: leaves_of(each) for name, each in problem.values().items()}
    loss = problem.outer(values, inner_steps)
    wanted = [*values["theta"].values(), *values["w"].values()]
    *expected, by_target, by_said = torch.autograd.grad(
        loss, [*wanted, values["target"]["t"], values["said"]["s"]], materialize_grads=True
    )
    found = problem.gradient(method, inner_steps)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close([*found.theta.values(), *found.w.values()], expected, rtol=1e-10, atol=1e-14)
    target, said = (value.requires_grad_() for value in (problem.target.clone(), problem.said.clone()))
    both = torch.autograd.grad(distilled(target, lambda _: said, distill), [target, said], found.target, materialize_grads=True)
    torch.testing.assert_close(list(both), [by_target, by_said], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("argument", ["theta", "w", "target", "said"])
@pytest.mark.parametrize("distill", ["logits", "both"])
def test_gradient_where_logits_are_distilled_is_the_slope_of_the_outer_loss(
    distill: Distill, argument: str, method: GradientMethod, inner_steps: int
) -> None:
    problem = LogitsProblem(distill=distill)
    values, found = problem.values(), problem.gradient(method, inner_steps)
    for _ in range(2):
        direction = {name: torch.randn_like(value) for name, value in values[argument].items()}

        def along(step: float, direction: Params = direction) -> float:
            moved = {**values, argument: {name: value + step * direction[name] for name, value in values[argument].items()}}
            moved["theta"] = leaves_of(moved["theta"])
            return problem.outer(moved, inner_steps).item()

        if argument in ("theta", "w"):
            slope = flat(found.theta if argument == "theta" else found.w) @ flat(direction)
        else:  # what is distilled is linear in the features and the logits of the target
            by = {
                "target": torch.zeros(S, D).double(),
                "said": torch.zeros(S, K).double(),
                argument: next(iter(direction.values())),
            }
            slope = (found.target * distilled(by["target"], lambda _, by=by: by["said"], distill)).sum()
        assert slope.item() == pytest.approx(central_difference(along), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("method", ["forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("inner_loss", get_args(InnerLoss))
@pytest.mark.parametrize("distill", ["logits", "both"])
def test_chunks_and_folding_change_nothing_where_logits_are_distilled(
    distill: Distill, inner_loss: InnerLoss, method: GradientMethod, chunk_size: int
) -> None:
    problem = Problem(inner_loss, distill)
    one, other = problem.gradient(method, 3, chunk_size, Folding(problem.network.features)), problem.gradient("double_backward", 3)
    assert one.inner_loss.item() == pytest.approx(other.inner_loss.item(), rel=1e-12)
    assert distance(flat(one.theta), flat(other.theta)) < 1e-11
    assert distance(flat(one.w), flat(other.w)) < 1e-11
    assert distance(one.target, other.target) < 1e-11


def test_a_mean_square_of_both_is_the_sum_of_the_two() -> None:
    (f, s), (t, u) = ((torch.randn(S, D).double(), torch.randn(S, K).double()) for _ in "ab")
    both = distilled(f, lambda _: s, "both") - distilled(t, lambda _: u, "both")
    assert both.square().mean().item() == pytest.approx((f - t).square().mean().item() + (s - u).square().mean().item(), rel=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distill", ["logits", "both"])
def test_phi_gets_the_slope_where_logits_are_distilled(distill: Distill, method: GradientMethod) -> None:
    problem = LogitsProblem(distill=distill)
    aggregator = Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.1, output_map=True).double()
    tokens = torch.randn(S, 3, D, dtype=torch.float64)
    settings: dict[str, Any] = {"inner_lr": problem.inner_lr, "distill": distill, "way": Way(method)}
    learner = MetaLearner(student=problem.network, aggregator=aggregator, task=Task("multiclass", num_outputs=K), **settings)
    learner.add_gradients([EpisodeBatch(problem.support, tokens, problem.query, problem.labels)])
    phi = learner.aggregator_parameters
    start = [parameter.detach().clone() for parameter in phi]
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in phi]

        def along(step: float, direction: list[Tensor] = direction) -> float:
            with torch.no_grad():
                for parameter, value, d in zip(phi, start, direction, strict=True):
                    parameter.copy_(value + step * d)
                target, said = aggregator(tokens), aggregator.logits(tokens)
            return problem.loss_by_hand(leaves_of(problem.theta), problem.w, target, said, inner_steps=1).item()

        slope = sum(float((p.grad * d).sum()) for p, d in zip(phi, direction, strict=True) if p.grad is not None)
        assert slope == pytest.approx(central_difference(along), rel=1e-6, abs=1e-9)
        assert abs(slope) > 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_students_with_attention_can_be_meta_trained(method: GradientMethod) -> None:
    student = build_network("timm:test_vit", image_shape=(3, 32, 32), num_outputs=3).double().eval()
    aggregator = Aggregator(width=student.width, num_outputs=3, depth=1, heads=4, dropout=0.1).double()
    learner = MetaLearner(student=student, aggregator=aggregator, task=Task("multiclass", 3), inner_lr=0.1, way=Way(method))
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    tokens = torch.randn(3, 2, student.width, dtype=torch.float64)
    learner.add_gradients([EpisodeBatch(images[:3], tokens, images[3:], torch.tensor([0, 1, 2]))])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aggregator.blocks.parameters())
