"""One meta-training update: what it averages, what it reaches, and what it must not know."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import Duration, MetaConfig, OptimizerConfig
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.meta.gradient import Distill, GradientMethod
from dmoe.meta.learner import EpisodeBatch, Learns, MetaLearner, Way, ZeroTarget
from dmoe.meta.training import gradients_that_fit, meta_train
from dmoe.models.aggregator import Aggregator, Pooling
from dmoe.models.expert_pool import ExpertPool, Mask, without_own_expert
from dmoe.models.networks import Network
from dmoe.optimizers import ScheduledAdam
from dmoe.run_folder import Stage
from dmoe.tasks import Task
from dmoe.tokens import TokenStore

S, Q, N, D, K = 4, 3, 3, 8, 3
TASK = Task("multiclass", num_outputs=K)


def extractor() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, D)).double()


def student() -> Network:
    return Network(features=extractor(), head=nn.Linear(D, K).double())


def aggregator() -> Aggregator:
    return Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.5).double()


def episode(tokens: Tensor | None = None) -> EpisodeBatch:
    support, query = torch.randn(S, 1, 6, 6, dtype=torch.float64), torch.randn(Q, 1, 6, 6, dtype=torch.float64)
    tokens = torch.randn(S, N - 1, D, dtype=torch.float64) if tokens is None else tokens
    return EpisodeBatch(support, tokens, query, torch.randint(K, (Q,)))


def learner_of(network: Network, teacher: Aggregator | ZeroTarget) -> MetaLearner:
    return MetaLearner(student=network, aggregator=teacher, task=TASK, inner_lr=0.3)


def gradients(learner: MetaLearner, episodes: list[EpisodeBatch]) -> tuple[dict[str, float], list[Tensor]]:
    """Scalars and gradients of theta, w and phi; none are left behind."""
    values = learner.add_gradients(episodes)
    parameters = [*learner.student_parameters, *learner.aggregator_parameters]
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    assert len(found) == len(parameters)
    for parameter in parameters:
        parameter.grad = None
    return values, found


def test_an_update_is_made_on_the_mean_over_its_domains() -> None:
    learner, episodes = learner_of(student(), aggregator()), [episode(), episode(), episode()]
    alone = [gradients(learner, [one]) for one in episodes]
    values, together = gradients(learner, episodes)
    torch.testing.assert_close(together, [torch.stack(each).mean(0) for each in zip(*(g for _, g in alone), strict=True)])
    for key in ("query_loss", "inner_loss", "query_accuracy"):
        assert values[key] == pytest.approx(sum(v[key] for v, _ in alone) / 3)


def test_gradients_are_added_to_those_that_are_there() -> None:
    learner, one = learner_of(student(), aggregator()), episode()
    _, once = gradients(learner, [one])
    learner.add_gradients([one])
    _, twice = gradients(learner, [one])
    torch.testing.assert_close(twice, [2 * gradient for gradient in once])


@pytest.mark.parametrize("mask", ["remove", "zero", "none"])
def test_only_without_a_mask_does_the_own_expert_matter(mask: Mask) -> None:
    own, learner, images = 1, learner_of(student(), aggregator()), episode()
    experts = [extractor() for _ in range(N)]

    def outcome() -> tuple[dict[str, float], list[Tensor]]:
        tokens = without_own_expert(ExpertPool(experts)(images.support), torch.full((S,), own), mask=mask)
        return gradients(learner, [EpisodeBatch(images.support, tokens, images.query, images.labels)])

    before = outcome()
    with torch.no_grad():
        for parameter in experts[own].parameters():
            parameter.add_(torch.randn_like(parameter))
    after = outcome()
    unchanged = before[0] == after[0] and all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert unchanged == (mask != "none")


class ThreeDomains(DomainSplit):
    """Twelve random images, domain after domain."""

    def __init__(self) -> None:
        self._images, self.labels = torch.randn(12, 1, 6, 6), torch.arange(12) % K
        self.domains = self.group_domains = torch.arange(3).repeat_interleave(4)
        self.domain_names = {}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._images[index]


@pytest.mark.parametrize("mask", ["remove", "zero", "none"])
def test_meta_training_ends_the_same_whatever_the_own_experts_say(tmp_path: Path, mask: Mask) -> None:
    split, own = ThreeDomains(), torch.tensor([2, 0, 1]).repeat_interleave(4)
    tokens = torch.randn(12, N, D)
    tampered = tokens.clone()
    tampered[torch.arange(12), own] = 100 * torch.randn(12, D)
    network, teacher = student().float(), aggregator().float()
    adam = OptimizerConfig(lr=0.01)
    config = MetaConfig(
        duration=Duration(5, "steps"), support_size=2, query_size=2, inner_lr=0.3, mask=mask, student=adam, aggregator=adam
    )

    def trained(name: str, store: np.ndarray) -> list[Tensor]:
        learner = learner_of(copy.deepcopy(network), copy.deepcopy(teacher))
        around: dict[str, Any] = {"checkpoint_every": 100, "seed": 1, "device": torch.device("cpu"), "evaluate": lambda: 0.0}
        stage = Stage(tmp_path / name, {})
        meta_train(
            stage=stage, learner=learner, split=split, tokens=TokenStore(store[:, None]), own_expert=own, config=config, **around
        )
        return [p.detach() for p in (*learner.student_parameters, *learner.aggregator_parameters)]

    pairs = zip(trained("one", tokens.numpy()), trained("other", tampered.numpy()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == (mask != "none")


@pytest.mark.parametrize("mask", ["remove", "zero"])
def test_every_other_expert_matters_under_a_mask(mask: Mask) -> None:
    learner, images, tokens = learner_of(student(), aggregator()), episode(), torch.randn(S, N, D, dtype=torch.float64)

    def query_loss(tokens: Tensor) -> float:
        masked = without_own_expert(tokens, torch.full((S,), 1), mask=mask)
        batch = EpisodeBatch(images.support, masked, images.query, images.labels)
        return gradients(learner, [batch])[0]["query_loss"]

    for other in (0, 2):
        changed = tokens.clone()
        changed[:, other] += 1
        assert query_loss(changed) != query_loss(tokens)


def test_the_head_of_the_aggregator_has_no_part_in_it() -> None:
    teacher = aggregator()
    learner = learner_of(student(), teacher)
    learner.add_gradients([episode()])
    assert all(parameter.grad is None for parameter in teacher.head.parameters())
    assert all(parameter.grad is not None for parameter in teacher.blocks.parameters())
    assert {id(p) for p in learner.aggregator_parameters} == {id(p) for p in teacher.blocks.parameters()}


def test_the_output_map_of_the_aggregator_learns() -> None:
    teacher = Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.0, output_map=True).double()
    learner_of(student(), teacher).add_gradients([episode()])
    assert teacher.output_map is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in teacher.output_map.parameters())


@pytest.mark.parametrize(
    ("distill", "parts"),
    [("features", {"blocks", "output_map"}), ("logits", {"blocks", "head"}), ("both", {"blocks", "output_map", "head"})],
)
def test_of_the_aggregator_what_has_a_part_in_what_is_distilled_learns(distill: Distill, parts: set[str]) -> None:
    teacher = Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.0, output_map=True).double()
    MetaLearner(student=student(), aggregator=teacher, task=TASK, inner_lr=0.3, distill=distill).add_gradients([episode()])
    learned = {name.split(".")[0] for name, p in teacher.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learned == parts


@pytest.mark.parametrize("learns", ["student", "aggregator"])
def test_where_one_of_the_two_learns_it_is_by_the_same_gradients_and_the_other_has_none(learns: Learns) -> None:
    network, teacher, one = student(), aggregator(), episode()
    both = learner_of(network, teacher)
    _, expected = gradients(both, [one])
    ours = slice(None, len(both.student_parameters)) if learns == "student" else slice(len(both.student_parameters), None)
    learner = MetaLearner(student=network, aggregator=teacher, task=TASK, inner_lr=0.3, learns=learns)
    _, found = gradients(learner, [one])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[ours], strict=True))
    learner.add_gradients([one])
    theirs = both.aggregator_parameters if learns == "student" else both.student_parameters
    assert all(parameter.grad is None for parameter in theirs)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_without_parameters_leaves_the_student_to_learn_alone(pooling: Pooling) -> None:
    teacher = Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.0, pooling=pooling).double()
    learner, one = learner_of(student(), teacher), episode()
    assert learner.aggregator_parameters == []
    values, _ = gradients(learner, [one])
    pooled = one.tokens.amax(dim=1) if pooling == "max" else one.tokens.mean(dim=1)
    expected = (learner.student.features(one.support) - pooled).square().mean().item()
    assert values["inner_loss"] == pytest.approx(expected, rel=1e-12)


def test_batch_norm_and_dropout_stay_in_eval_mode() -> None:
    network, teacher = student().train(), aggregator().train()
    learner, one = learner_of(network, teacher), episode()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    first, second = gradients(learner, [one]), gradients(learner, [one])
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_an_update_steps_both_optimizers_and_clears_the_gradients() -> None:
    learner = learner_of(student(), aggregator())
    config = OptimizerConfig(lr=0.01)
    adams = [
        ScheduledAdam(p, config, steps=1, steps_per_epoch=1) for p in (learner.student_parameters, learner.aggregator_parameters)
    ]
    before = [[p.detach().clone() for p in adam.parameters] for adam in adams]
    values = learner.update(0, [episode()], adams[0], adams[1])
    for adam, old, key in zip(adams, before, ("student_gradient_norm", "aggregator_gradient_norm"), strict=True):
        assert any(not torch.equal(p, value) for p, value in zip(adam.parameters, old, strict=True))
        assert all(parameter.grad is None for parameter in adam.parameters)
        assert values[key] > 0


def test_a_zero_target_pulls_the_features_towards_nothing() -> None:
    network, one = student(), episode()
    learner = learner_of(network, ZeroTarget())
    assert learner.aggregator_parameters == []
    values, found = gradients(learner, [one])
    features = network.features(one.support)
    assert values["inner_loss"] == pytest.approx(features.square().mean().item())

    step = torch.autograd.grad(features.square().mean(), list(network.features.parameters()), create_graph=True)
    names = [name for name, _ in network.features.named_parameters()]
    adapted = {n: p - 0.3 * g for n, p, g in zip(names, network.features.parameters(), step, strict=True)}
    logits = network.head(torch.func.functional_call(network.features, adapted, (one.query,)))
    expected = torch.autograd.grad(F.cross_entropy(logits, one.labels), [*network.parameters()])
    torch.testing.assert_close(found, list(expected))


def test_a_zero_target_needs_no_optimizer_of_an_aggregator() -> None:
    learner = learner_of(student(), ZeroTarget())
    adam = ScheduledAdam(learner.student_parameters, OptimizerConfig(lr=0.01), steps=1, steps_per_epoch=1)
    assert "aggregator_gradient_norm" not in learner.update(0, [episode()], adam, None)


def test_a_zero_target_asks_no_tokens() -> None:
    one, other = torch.randn(S, N, D), torch.randn(S, N, D)
    assert torch.equal(ZeroTarget()(one), ZeroTarget()(other))
    assert ZeroTarget()(one).shape == (S, D)


def test_a_regression_has_no_query_accuracy() -> None:
    network = Network(features=extractor(), head=nn.Linear(D, 1).double())
    task = Task("regression", num_outputs=1)
    learner = MetaLearner(student=network, aggregator=aggregator(), task=task, inner_lr=0.1)
    one = episode()
    values = learner.add_gradients([EpisodeBatch(one.support, one.tokens, one.query, torch.randn(Q))])
    assert values["query_loss"] > 0
    assert "query_accuracy" not in values


@pytest.mark.parametrize("method", get_args(GradientMethod))
def test_bfloat16_episodes_give_nearly_the_same_gradients_in_float32(method: GradientMethod) -> None:
    torch.manual_seed(0)
    network, teacher, one = student().float(), aggregator().float(), episode()
    one = EpisodeBatch(one.support.float(), one.tokens.float(), one.query.float(), one.labels)
    found = []
    for precision in ("float32", "bfloat16"):
        learner = MetaLearner(student=network, aggregator=teacher, task=TASK, inner_lr=0.3, way=Way(method), precision=precision)
        found.append(torch.cat([g.flatten() for g in gradients(learner, [one])[1]]))
    assert found[1].dtype == torch.float32
    assert 1e-5 < (found[1] - found[0]).norm() / found[0].norm() < 0.05


def test_the_way_decides_how_convolutions_lie_in_memory_and_no_number() -> None:
    network = student()
    learner, one = learner_of(network, aggregator()), episode()
    weight = network.features[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    _, before = gradients(learner, [one])
    learner.way = Way("double_backward")
    assert network.features[0].weight is weight
    assert weight.is_contiguous()
    torch.testing.assert_close(gradients(learner, [one])[1], before)


@pytest.mark.parametrize("way", [Way("forward_over_reverse"), Way("forward_over_reverse", 2), Way("reverse_over_reverse", 3)])
def test_many_updates_end_in_the_same_weights_whatever_the_way(way: Way) -> None:
    """In float64; in float32 the rounding of one order of sums or another grows with every update, by whichever way."""
    network, teacher = student(), aggregator()
    episodes, found = [[episode(), episode()] for _ in range(24)], []
    for each in (Way("double_backward"), way):
        ours, phi = copy.deepcopy(network), copy.deepcopy(teacher)
        learner = MetaLearner(student=ours, aggregator=phi, task=TASK, inner_lr=0.3, way=each)
        settings = {"steps": 24, "steps_per_epoch": 24}
        adams = [
            ScheduledAdam(parameters, OptimizerConfig(lr=1e-2), **settings)
            for parameters in (learner.student_parameters, learner.aggregator_parameters)
        ]
        for number, some in enumerate(episodes):
            learner.update(number, some, *adams)
        found.append(torch.cat([p.detach().flatten() for p in (*ours.parameters(), *phi.parameters())]))
    start = torch.cat([p.detach().flatten() for p in (*network.parameters(), *teacher.parameters())])
    assert (found[0] - start).norm() > 0.01 * start.norm()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


class Narrow(nn.Module):
    """Has no memory for more than a few images at a time."""

    def __init__(self, features: nn.Module, at_most: int) -> None:
        super().__init__()
        self.features, self.at_most = features, at_most
        self.asked: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        if len(images) > self.at_most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.features(images)


@pytest.mark.parametrize(("at_most", "ways"), [(3, [2]), (2, [2]), (1, [2, 1])])
def test_without_memory_the_same_gradients_come_in_halves(at_most: int, ways: list[int]) -> None:
    network, teacher, episodes = student(), aggregator(), [episode(), episode()]
    _, plain = gradients(learner_of(network, teacher), episodes)
    changes: list[Way] = []
    narrow = learner_of(Network(features=Narrow(network.features, at_most), head=network.head), teacher)
    narrow.way = Way("double_backward")
    gradients_that_fit(narrow, episodes, changed=changes.append)
    found = [p.grad for p in (*narrow.student_parameters, *narrow.aggregator_parameters)]
    torch.testing.assert_close(found, plain)
    assert changes == [Way("forward_over_reverse", size) for size in ways]
    assert narrow.way == changes[-1]
    gradients_that_fit(narrow, episodes, changed=changes.append)
    assert len(changes) == len(ways)  # it stays so


def test_without_memory_for_one_image_there_is_one_line() -> None:
    network = student()
    narrow = learner_of(Network(features=Narrow(network.features, 0), head=network.head), aggregator())
    with pytest.raises(UserError, match="memory does not suffice for one image") as caught:
        gradients_that_fit(narrow, [episode()], changed=lambda way: None)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    broken = learner_of(student(), aggregator())
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size|shape"):
        gradients_that_fit(broken, [episode(tokens=torch.randn(S, N - 1, D + 1, dtype=torch.float64))], changed=pytest.fail)
