"""Outer gradients of a student with sparse layers: all ways to them, finite differences, and adapting by one pass or many."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from dmoe.meta.gradient import GradientMethod, adapted_parameters, meta_gradient
from dmoe.models.networks import Network, build_network
from dmoe.models.sparse import SparseSettings, routings, sparse_layers
from dmoe.models.student import Student
from dmoe.tasks import Task

SHAPE, S, Q, K, INNER_LR = (1, 6, 6), 4, 3, 3, 0.3


def network(kind: str) -> Network:
    torch.manual_seed(3)
    gmoe = kind == "gmoe"
    settings = SparseSettings(
        kind="gmoe" if gmoe else "emoe",
        experts=3 if gmoe else 8,
        top_k=2 if gmoe else 3,
        router="cosine" if gmoe else "average",
        capacity_factor=None,
        blocks=(0, 1),
        gate_noise=1.0,
        balance_weight=0.01,
        dropout=0.1,
        drop_path=0.1,
    )
    made = build_network("small_vit", image_shape=SHAPE, num_outputs=K, sparse=settings).double().eval()
    for name, parameter in made.named_parameters():
        if "norm" not in name:  # experts that are told apart, and biases
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made


class Problem:
    """An episode."""

    def __init__(self, kind: str) -> None:
        self.network = network(kind)
        self.theta = {name: p.detach() for name, p in self.network.features.named_parameters()}
        self.w = {name: p.detach() for name, p in self.network.head.named_parameters()}
        made = torch.Generator().manual_seed(5)
        self.support, self.query = (torch.randn(n, *SHAPE, dtype=torch.float64, generator=made) for n in (S, Q))
        self.target = torch.randn(S, 64, dtype=torch.float64, generator=made)
        self.labels = torch.tensor([0, 2, 1])

    def features(self, theta: dict[str, Tensor], images: Tensor) -> Tensor:
        found: Tensor = functional_call(self.network.features, (theta, dict(self.network.features.named_buffers())), (images,))
        return found

    def outer_loss(self, theta: dict[str, Tensor], target: Tensor) -> float:
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss = (self.features(leaves, self.support) - target).square().mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        stepped = {name: value.detach() - INNER_LR * g for (name, value), g in zip(leaves.items(), gradients, strict=True)}
        with torch.no_grad():
            return F.cross_entropy(self.network.head(self.features(stepped, self.query)), self.labels).item()

    def gradient(self, method: GradientMethod, chunk_size: int | None = None):
        return meta_gradient(
            features=self.features,
            head=lambda w, found: F.linear(found, w["weight"], w["bias"]),
            loss=F.cross_entropy,
            theta=self.theta,
            w=self.w,
            target=self.target,
            support=self.support,
            query=self.query,
            labels=self.labels,
            inner_lr=INNER_LR,
            method=method,
            chunk_size=chunk_size,
        )


@pytest.fixture(params=["gmoe", "emoe"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def test_every_way_and_every_chunk_gives_the_same(problem: Problem) -> None:
    expected = problem.gradient("double_backward")
    sizes = {name: value.abs().max() for name, value in expected.theta.items()}
    assert all(size > 0 for name, size in sizes.items() if ".mlp.w" in name)
    assert sizes.get("blocks.1.mlp.router.codes", torch.ones(())) > 0
    for method in get_args(GradientMethod):
        for chunk_size in [None] if method == "double_backward" else [None, 3]:
            found = problem.gradient(method, chunk_size)
            for name, value in found.theta.items():
                torch.testing.assert_close(value, expected.theta[name], rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(found.target, expected.target, rtol=1e-9, atol=1e-13)


def test_finite_differences_agree(problem: Problem) -> None:
    found, step = problem.gradient("forward_over_reverse"), 1e-5
    torch.manual_seed(7)
    v = {name: torch.randn_like(value) for name, value in problem.theta.items()}
    by_theta = sum((found.theta[name] * v[name]).sum().item() for name in v)
    ends = [
        problem.outer_loss({name: p + sign * step * v[name] for name, p in problem.theta.items()}, problem.target)
        for sign in (1, -1)
    ]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(by_theta, rel=1e-5)
    u = torch.randn_like(problem.target)
    ends = [problem.outer_loss(problem.theta, problem.target + sign * step * u) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((found.target * u).sum().item(), rel=1e-5)


def test_noise_and_dropout_are_off_where_a_student_is_adapted_and_what_adapting_makes_is_the_same_again(problem: Problem) -> None:
    problem.network.train()
    student = Student(features=problem.network.features, head=problem.network.head, task=Task("multiclass", K))
    state = torch.random.get_rng_state()
    one, two = (student.adapted(problem.support, problem.target, inner_lr=INNER_LR).logits(problem.query) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.random.get_rng_state())
    problem.network.eval()
    stepped = adapted_parameters(problem.features, problem.theta, problem.support, problem.target, inner_lr=INNER_LR)
    torch.testing.assert_close(one, problem.network.head(problem.features(stepped, problem.query)), rtol=1e-10, atol=1e-12)


def test_students_of_many_domains_in_one_pass_are_those_of_each(problem: Problem) -> None:
    student = Student(features=problem.network.features, head=problem.network.head, task=Task("multiclass", K))
    images = torch.stack([problem.support, problem.support.flip(0) * 0.7])
    targets = torch.stack([problem.target, problem.target * 0.5])
    together = student.adapted_to_many(images, targets, inner_lr=INNER_LR)
    for number, many in enumerate(together):
        alone = student.adapted(images[number], targets[number], inner_lr=INNER_LR)
        torch.testing.assert_close(many.logits(problem.query), alone.logits(problem.query), rtol=1e-9, atol=1e-11)


def test_a_routing_of_the_students_features_has_the_patches_of_all_images(problem: Problem) -> None:
    with routings(problem.network.features) as found:
        problem.network.features(problem.support)
    assert list(found) == list(sparse_layers(problem.network.features)) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert all(len(routing.experts) == S * 4 for routing in found.values())
