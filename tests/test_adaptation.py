"""The adapter round modules of one's own: what it computes, and what it leaves alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.adaptation import Adapter
from dmoe.diagnosis import Diagnosis, Range, Ranges
from dmoe.errors import SuspectAdaptation
from dmoe.tasks import Task

D, K = 6, 3
INNER_LR = 0.4


class MeanOfExperts(nn.Module):
    """An aggregator that is nobody's transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * tokens.mean(dim=1)

    def logits(self, tokens: Tensor) -> Tensor:
        return tokens.sum(dim=1)[:, :K]


class Parts:
    """Plain modules, left in training mode, as a user might hand them in."""

    def __init__(self) -> None:
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 4 * 4, D)
        ).double()
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, K)).double()
        self.experts = [
            nn.Sequential(nn.Conv2d(2, D, 3), nn.BatchNorm2d(D), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double() for _ in "ab"
        ]
        self.aggregator = MeanOfExperts().double()
        for norm in (self.features[1], *(expert[1] for expert in self.experts)):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)

    def adapter(self, **settings: Any) -> Adapter:
        parts = {"features": self.features, "head": self.head, "experts": self.experts, "aggregator": self.aggregator}
        return Adapter(**{**parts, "inner_lr": INNER_LR, **settings})

    def __iter__(self) -> Iterator[nn.Module]:
        yield from (self.features, self.head, *self.experts, self.aggregator)

    def state(self) -> list[Any]:
        """All that could be changed in them; tensors by identity and by value."""
        found: list[Any] = []
        for part in self:
            found += [module.training for module in part.modules()]
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                grad = None if tensor.grad is None else tensor.grad.tolist()
                found += [name, id(tensor), tensor.tolist(), tensor.requires_grad, grad]
        return found


@pytest.fixture
def parts() -> Parts:
    return Parts()


def batch(count: int = 5) -> Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64)


def features_by_hand(theta: dict[str, Tensor], running: nn.BatchNorm2d, x: Tensor) -> Tensor:
    x = F.conv2d(x, theta["0.weight"], theta["0.bias"])
    shift, scale = running.running_mean.view(-1, 1, 1), (running.running_var + running.eps).rsqrt().view(-1, 1, 1)
    x = ((x - shift) * scale * theta["1.weight"].view(-1, 1, 1) + theta["1.bias"].view(-1, 1, 1)).clamp(min=0)
    return x.flatten(1) @ theta["5.weight"].T + theta["5.bias"]


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_adapting_is_a_gradient_step_of_the_features_towards_the_target(parts: Parts, inner_steps: int) -> None:
    x, fresh = batch(), batch()
    adapted = parts.adapter(inner_steps=inner_steps).adapt(x)

    for part in parts:
        part.eval()
    target = 1.5 * (parts.experts[0](x) + parts.experts[1](x)).detach() / 2
    theta = {name: p.detach().clone() for name, p in parts.features.named_parameters()}
    for _ in range(inner_steps):
        leaves = {name: value.requires_grad_() for name, value in theta.items()}
        loss = (features_by_hand(leaves, parts.features[1], x) - target).pow(2).sum() / (len(x) * D)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        theta = {name: (value - INNER_LR * g).detach() for (name, value), g in zip(theta.items(), gradients, strict=True)}
    expected = parts.head(features_by_hand(theta, parts.features[1], fresh))
    torch.testing.assert_close(adapted.logits(fresh), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dict(adapted.parameters()), theta, rtol=1e-11, atol=1e-12)


def test_the_target_is_the_aggregator_of_all_experts(parts: Parts) -> None:
    x, adapter = batch(), parts.adapter()
    target = adapter.target(x)
    for part in parts:
        part.eval()
    torch.testing.assert_close(target, 1.5 * (parts.experts[0](x) + parts.experts[1](x)) / 2)
    assert not target.requires_grad


def test_experts_can_normalise_by_the_batch(parts: Parts) -> None:
    x = batch()
    target = parts.adapter(expert_batch_norm="batch").target(x)
    maps = [F.batch_norm(one[0](x), None, None, one[1].weight, one[1].bias, training=True) for one in parts.experts]
    torch.testing.assert_close(target, 1.5 * (maps[0] + maps[1]).mean(dim=(2, 3)) / 2)


def test_adapting_changes_what_is_predicted(parts: Parts) -> None:
    adapter, fresh = parts.adapter(), batch()
    assert (adapter.adapt(batch()).logits(fresh) - adapter.student.logits(fresh)).abs().max() > 1e-3


@pytest.mark.parametrize("expert_batch_norm", ["running", "batch"])
def test_adapting_and_predicting_change_nothing_in_the_modules_handed_in(parts: Parts, expert_batch_norm: str) -> None:
    for part in (parts.features, parts.head):
        for parameter in part.parameters():
            parameter.grad = torch.randn_like(parameter)
    parts.features[0].weight.requires_grad_(False)
    parts.head.eval()
    before = parts.state()
    adapter = parts.adapter(expert_batch_norm=expert_batch_norm, inner_steps=2)
    adapter.adapt(batch()).predict(batch())
    adapter.student.predict(batch())
    assert parts.state() == before


def test_predictions_carry_no_graph(parts: Parts) -> None:
    adapter = parts.adapter()
    for student in (adapter.student, adapter.adapt(batch())):
        assert not student.logits(batch()).requires_grad


def test_every_domain_starts_from_the_same_student(parts: Parts) -> None:
    adapter, one, other, fresh = parts.adapter(), batch(), batch() + 1, batch()
    unadapted, first = adapter.student.logits(fresh), adapter.adapt(one).logits(fresh)
    adapter.adapt(other)
    assert torch.equal(adapter.adapt(one).logits(fresh), first)
    assert torch.equal(adapter.student.logits(fresh), unadapted)


def test_adapting_goes_on_from_a_student_that_was_returned_before(parts: Parts) -> None:
    """As many inner steps towards the same target, in two calls or in one; with known tokens too."""
    x, fresh, tokens = batch(), batch(), torch.randn(5, 2, D, dtype=torch.float64)
    two, three, five = (parts.adapter(inner_steps=steps, inner_lr=0.05) for steps in (2, 3, 5))
    for known in (None, tokens):
        first = two.adapt(x, tokens=known)
        before = first.logits(fresh)
        found = three.adapt(x, tokens=known, start=first).logits(fresh)
        assert torch.equal(found, five.adapt(x, tokens=known).logits(fresh))
        assert torch.equal(first.logits(fresh), before), "the student gone on from stays as it is"
        assert not torch.allclose(found, before)


def test_an_adapted_student_is_not_changed_by_the_next_adaptation(parts: Parts) -> None:
    adapter, fresh = parts.adapter(), batch()
    student = adapter.adapt(batch())
    before = student.logits(fresh)
    adapter.adapt(batch() + 1)
    assert torch.equal(student.logits(fresh), before)


def test_two_threads_adapting_at_once_give_what_one_after_the_other_gives(parts: Parts) -> None:
    adapter, fresh = parts.adapter(inner_steps=3, expert_batch_norm="batch"), batch(20)
    domains = [batch(24) + shift for shift in range(16)]

    def adapt(images: Tensor) -> Tensor:
        return adapter.adapt(images).logits(fresh)

    expected = [adapt(images) for images in domains]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for found, one in zip(pool.map(adapt, domains), expected, strict=True):
            assert torch.equal(found, one)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_adapting_does_not_depend_on_the_gradient_mode_around_it(parts: Parts, mode: Any) -> None:
    adapter, x, fresh = parts.adapter(), batch(), batch()
    expected = adapter.adapt(x).logits(fresh)
    with mode():
        assert torch.equal(adapter.adapt(x).logits(fresh), expected)


def test_frozen_features_are_adapted_too(parts: Parts) -> None:
    x, fresh = batch(), batch()
    expected = parts.adapter().adapt(x).logits(fresh)
    parts.features.requires_grad_(False)
    assert torch.equal(parts.adapter().adapt(x).logits(fresh), expected)


@pytest.mark.parametrize("shape", [(2, 6, 6), (0, 2, 6, 6), (5, 72), (1, 5, 2, 6, 6)])
def test_what_is_not_a_batch_of_images_is_refused(parts: Parts, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        parts.adapter().adapt(torch.zeros(shape, dtype=torch.float64))


def test_predictions_are_a_softmax_unless_a_task_says_otherwise(parts: Parts) -> None:
    fresh = batch()
    student = parts.adapter().adapt(batch())
    torch.testing.assert_close(student.predict(fresh), student.logits(fresh).softmax(dim=1))
    regression = parts.adapter(task=Task("regression", num_outputs=K)).student
    assert torch.equal(regression.predict(fresh), regression.logits(fresh))


def test_known_tokens_take_the_place_of_the_experts() -> None:
    parts, images = Parts(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    tokens = torch.randn(5, 2, D, dtype=torch.float64)
    target = parts.aggregator(tokens).detach()
    expected = parts.adapter().student.adapted(images, target, inner_lr=INNER_LR).parameters()
    found = parts.adapter().adapt(images, tokens=tokens).parameters()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"inner_steps": 3},
        {"inner_loss": "norm"},
        {"expert_batch_norm": "batch"},
        {"distill": "logits", "inner_steps": 2},
        {"distill": "both"},
    ],
)
def test_many_domains_at_once_are_adapted_to_as_one_by_one(settings: dict[str, Any]) -> None:
    adapter, images = Parts().adapter(**settings), torch.randn(4, 5, 2, 6, 6, dtype=torch.float64)
    together, elsewhere = adapter.adapt_many(images), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for found, domain in zip(together, images, strict=True):
        alone = adapter.adapt(domain)
        torch.testing.assert_close(dict(found.parameters()), dict(alone.parameters()), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.predict(elsewhere), alone.predict(elsewhere), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(together[0].predict(elsewhere), together[1].predict(elsewhere))


@pytest.mark.parametrize("distill", ["logits", "both"])
def test_logits_are_brought_together_by_steps_of_the_features_alone(parts: Parts, distill: str) -> None:
    x, fresh, tokens = batch(), batch(), torch.randn(5, 2, D, dtype=torch.float64)
    adapter = parts.adapter(distill=distill, inner_steps=2, ranges=ranges(NEVER))
    adapted = adapter.adapt(x, tokens=tokens)

    for part in parts:
        part.eval()
    target, said = parts.aggregator(tokens).detach(), parts.aggregator.logits(tokens).detach()
    theta = {name: p.detach().clone() for name, p in parts.features.named_parameters()}
    for _ in range(2):
        leaves = {name: value.requires_grad_() for name, value in theta.items()}
        found = features_by_hand(leaves, parts.features[1], x)
        loss = (parts.head(found) - said).pow(2).sum() / (len(x) * K)
        if distill == "both":
            loss = loss + (found - target).pow(2).sum() / (len(x) * D)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        theta = {name: (value - INNER_LR * g).detach() for (name, value), g in zip(theta.items(), gradients, strict=True)}
    torch.testing.assert_close(dict(adapted.parameters()), theta, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(adapted.logits(fresh), parts.head(features_by_hand(theta, parts.features[1], fresh)))

    before = parts.features(x).detach()
    squares = (parts.head(before) - said).pow(2).mean() + (distill == "both") * (before - target).pow(2).mean()
    measured = adapted.diagnosis.statistics
    assert measured["distance to targets"] == pytest.approx(squares.sqrt().item(), rel=1e-10)
    after = adapted.features(x)
    moved = (parts.head(after) - parts.head(before)).pow(2).mean() + (distill == "both") * (after - before).pow(2).mean()
    assert measured["movement of features"] == pytest.approx(moved.sqrt().item(), rel=1e-10)
    (one,) = adapter.adapt_many(x[None])
    assert dict(one.diagnosis.statistics) == pytest.approx(dict(adapter.measure(x)), rel=1e-9)


@pytest.mark.parametrize("shape", [(5, 2, 6, 6), (0, 5, 2, 6, 6), (4, 0, 2, 6, 6)])
def test_many_domains_need_five_dimensions_and_an_image_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"adapt_many takes images \[G, B, C, H, W\]"):
        Parts().adapter().adapt_many(torch.zeros(shape, dtype=torch.float64))


# Watched

NEVER, ALWAYS = Range(0.0, 1e300), Range(-2.0, -1.0)
TASKS = [Task("multiclass", num_outputs=K), Task("regression", num_outputs=K), Task("binary", num_outputs=1)]


def ranges(bounds: Range) -> Ranges:
    names = ["spread of predictions", "spread of values", "variation of features", "movement of features"]
    return Ranges(dict.fromkeys(names, bounds), images=5)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_diagnosis_tells_of_the_students_before_and_after(parts: Parts, task: Task) -> None:
    if task.kind == "binary":
        parts.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1)).double()
    x = batch()
    adapter = parts.adapter(task=task, ranges=ranges(NEVER), inner_steps=2)
    adapted = adapter.adapt(x)
    found = adapted.diagnosis.statistics
    before, after, target = (f.detach().numpy() for f in (adapter.student.features(x), adapted.features(x), adapter.target(x)))
    assert found["movement of features"] == pytest.approx(np.sqrt(np.mean((after - before) ** 2)), rel=1e-10)
    assert found["distance to targets"] == pytest.approx(np.sqrt(np.mean((before - target) ** 2)), rel=1e-10)
    assert found["variation of features"] == pytest.approx(np.sqrt(before.var(axis=0, ddof=1).mean()), rel=1e-10)
    said = adapted.predict(x).numpy()
    if task.kind == "regression":
        assert found["spread of values"] == pytest.approx(np.sqrt(said.var(axis=0, ddof=1).mean()), rel=1e-10)
        assert not any("predictions" in name for name in found)
    else:
        mean = said.mean(axis=0)
        assert found["spread of predictions"] == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-10)
        assert found["entropy of predictions"] == pytest.approx(-(said * np.log(said)).sum(axis=1).mean(), rel=1e-10)
    assert found == adapter.measure(x)
    assert (adapted.diagnosis.images, adapted.diagnosis.usual_images) == (5, 5)


def test_without_ranges_nothing_is_measured_and_nothing_suspect(parts: Parts) -> None:
    adapter = parts.adapter(on_suspect="fall_back")
    for student in (adapter.adapt(batch()), *adapter.adapt_many(batch()[None]), adapter.student):
        assert student.diagnosis == Diagnosis()
        assert not student.diagnosis.suspect and "no ranges" in str(student.diagnosis)


@pytest.mark.parametrize("bounds", [NEVER, ALWAYS], ids=["as in training", "suspect"])
@pytest.mark.filterwarnings("ignore::dmoe.SuspectAdaptation")
@pytest.mark.parametrize("on_suspect", ["keep", "warn"])
def test_watching_changes_no_bit_of_what_is_adapted(parts: Parts, on_suspect: str, bounds: Range) -> None:
    x, fresh = batch(), batch()
    plain, watched = parts.adapter(), parts.adapter(ranges=ranges(bounds), on_suspect=on_suspect)
    assert torch.equal(watched.adapt(x).logits(fresh), plain.adapt(x).logits(fresh))
    many = zip(watched.adapt_many(torch.stack([x, fresh])), plain.adapt_many(torch.stack([x, fresh])), strict=True)
    assert all(torch.equal(one.logits(fresh), other.logits(fresh)) for one, other in many)


def test_a_suspect_is_warned_of_where_adapt_was_called(parts: Parts) -> None:
    adapter = parts.adapter(ranges=ranges(ALWAYS))
    with pytest.warns(SuspectAdaptation) as told:
        adapted = adapter.adapt(batch())
        adapter.adapt_many(torch.stack([batch(), batch()]))
    assert len(told) == 3
    assert str(told[0].message) == str(adapted.diagnosis) and str(adapted.diagnosis).startswith("suspect: spread of predictions ")
    assert {warning.filename for warning in told} == {__file__}


@pytest.mark.filterwarnings("error::dmoe.SuspectAdaptation")
def test_a_suspect_that_is_kept_or_fallen_back_from_is_not_warned_of(parts: Parts) -> None:
    for on_suspect in ("keep", "fall_back"):
        assert parts.adapter(ranges=ranges(ALWAYS), on_suspect=on_suspect).adapt(batch()).diagnosis.suspect
    assert not parts.adapter(ranges=ranges(NEVER)).adapt(batch()).diagnosis.suspect


def test_falling_back_gives_the_unadapted_student_with_the_diagnosis(parts: Parts) -> None:
    x, fresh = batch(), batch()
    adapter = parts.adapter(ranges=ranges(ALWAYS), on_suspect="fall_back")
    unadapted = adapter.student.logits(fresh)
    for student in (adapter.adapt(x), *adapter.adapt_many(torch.stack([x, fresh]))):
        assert student.diagnosis.suspect
        assert torch.equal(student.logits(fresh), unadapted)
    assert adapter.student.diagnosis == Diagnosis(), "the adapter's own student stays as it is"
    trusting = parts.adapter(ranges=ranges(NEVER), on_suspect="fall_back")
    assert torch.equal(trusting.adapt(x).logits(fresh), parts.adapter().adapt(x).logits(fresh))


def test_gone_on_from_a_student_the_fall_back_is_that_student(parts: Parts) -> None:
    x, fresh = batch(), batch()
    start = parts.adapter().adapt(fresh)
    found = parts.adapter(ranges=ranges(ALWAYS), on_suspect="fall_back").adapt(x, start=start)
    assert found.diagnosis.suspect
    assert torch.equal(found.logits(fresh), start.logits(fresh))


def test_only_the_suspect_of_many_domains_falls_back(parts: Parts) -> None:
    one_image_again = batch(1).expand(5, -1, -1, -1)
    bounds = Ranges({"variation of features": Range(1e-6, 1e9)}, images=5)
    adapter = parts.adapter(ranges=bounds, on_suspect="fall_back")
    varied, same = adapter.adapt_many(torch.stack([batch(), one_image_again]))
    assert (varied.diagnosis.suspect, same.diagnosis.outside) == (False, ("variation of features",))
    fresh = batch()
    assert torch.equal(same.logits(fresh), adapter.student.logits(fresh))
    assert not torch.equal(varied.logits(fresh), adapter.student.logits(fresh))


@pytest.mark.parametrize("settings", [{}, {"inner_steps": 3, "inner_lr": 0.03}, {"inner_loss": "norm"}])
def test_many_domains_at_once_have_the_diagnoses_of_each(settings: dict[str, Any]) -> None:
    adapter, images = Parts().adapter(ranges=ranges(NEVER), **settings), torch.randn(4, 5, 2, 6, 6, dtype=torch.float64) / 3
    for found, domain in zip(adapter.adapt_many(images), images, strict=True):
        assert found.diagnosis.statistics == pytest.approx(adapter.adapt(domain).diagnosis.statistics, rel=1e-9)
        assert found.diagnosis.images == 5


def test_one_image_is_adapted_to_and_does_not_vary(parts: Parts) -> None:
    found = parts.adapter(ranges=ranges(NEVER)).adapt(batch(1)).diagnosis
    assert found.statistics["variation of features"] == 0
    assert "images: 1, training episodes 5" in str(
        parts.adapter(ranges=ranges(ALWAYS), on_suspect="keep").adapt(batch(1)).diagnosis
    )


def test_watching_costs_one_pass_of_the_student_and_none_of_the_experts(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {"student": 0, "experts": 0}

    def counted(name: str, forward: Any) -> Any:
        def count(module: nn.Module, x: Tensor) -> Tensor:
            passes[name] += 1
            return forward(module, x)

        return count

    class Mine(nn.Linear):
        pass

    class Pool(nn.AdaptiveAvgPool2d):
        pass

    parts.features[5] = Mine(4 * 4 * 4, D).double()
    parts.experts[0][2] = Pool(1)
    monkeypatch.setattr(Mine, "forward", counted("student", nn.Linear.forward))
    monkeypatch.setattr(Pool, "forward", counted("experts", nn.AdaptiveAvgPool2d.forward))
    parts.adapter().adapt(batch())
    assert passes == {"student": 1, "experts": 1}
    parts.adapter(ranges=ranges(NEVER)).adapt(batch())
    assert passes == {"student": 1 + 2, "experts": 2}
