"""DANN: both sides' gradients, the schedule, and a problem in which the domain can be left out."""

import math

import pytest
import torch
import torch.nn.functional as F
from some_outputs import CLASSES, D, outputs

from dmoe.objectives import DANN, Outputs
from dmoe.tasks import Task


def dann(*, penalty: float = 0.7, ramp_steps: int = 0, features: int = D) -> DANN:
    objective = DANN(CLASSES, features=features, domains=[7, 2, 4], penalty=penalty, ramp_steps=ramp_steps, width=6)
    return objective.double()


def test_classifier_goes_down_and_features_go_up_its_loss() -> None:
    batch, objective = outputs(), dann()
    objective.loss(batch, step=0).backward()
    places = torch.tensor([[2, 4, 7].index(domain) for domain in batch.domains.tolist()])
    told = F.cross_entropy(objective.classifier(batch.features), places)
    by_features, *by_weights = torch.autograd.grad(told, [batch.features, *objective.classifier.parameters()])
    torch.testing.assert_close(batch.features.grad, -0.7 * by_features)
    for parameter, expected in zip(objective.classifier.parameters(), by_weights, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    risk = F.cross_entropy(batch.logits, batch.labels)
    torch.testing.assert_close(objective.loss(batch, step=0), risk + told)
    torch.testing.assert_close(batch.logits.grad, torch.autograd.grad(risk, batch.logits)[0])


@pytest.mark.parametrize("step", [0, 1, 5, 19])
def test_weight_rises_as_in_the_paper(step: int) -> None:
    expected = 0.7 * (2 / (1 + math.exp(-10 * step / 20)) - 1)
    assert dann(ramp_steps=20).weight(step) == pytest.approx(expected)


def test_weight_is_whole_after_the_ramp_or_without_one() -> None:
    assert dann(ramp_steps=20).weight(20) == dann().weight(0) == 0.7


@pytest.mark.parametrize(("penalty", "told"), [(0.0, True), (1.0, False)])
def test_a_feature_that_tells_the_domain_is_given_up_for_one_that_does_not(penalty: float, told: bool) -> None:
    """One input is the label, the other one the label and the domain: there is a feature of the label alone."""
    torch.manual_seed(0)
    task = Task("binary", num_outputs=1)
    labels, domains = torch.tensor([0, 1] * 64), torch.tensor([0, 0, 1, 1] * 32)
    clean = 2.0 * labels - 1
    inputs = torch.stack([clean, clean + 3 * (2.0 * domains - 1)], dim=1)
    weights = torch.tensor([[0.5], [0.5]], requires_grad=True)
    objective = DANN(task, features=1, domains=[0, 1], penalty=penalty, ramp_steps=0, width=8)
    adam = torch.optim.Adam([weights, *objective.parameters()], lr=0.02)
    for step in range(150):
        features = inputs @ weights
        adam.zero_grad()
        objective.loss(Outputs(features, features, labels, domains), step=step).backward()
        adam.step()
    features = (inputs @ weights).detach().squeeze(1)
    gap = (features[domains == 1].mean() - features[domains == 0].mean()).abs() / features.std()
    assert (gap > 0.25) == told
    assert ((features > 0) == labels.bool()).float().mean() > 0.95
