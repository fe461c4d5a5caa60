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


def test_once_the_classifier_has_learned_features_are_led_away_from_what_tells_the_domain() -> None:
    """One of two inputs is the label, the other one the domain, and the feature is their weighted sum."""
    task, labels, domains = Task("binary", num_outputs=1), torch.tensor([0, 1] * 8), torch.tensor([0, 0, 1, 1] * 4)
    inputs = torch.stack([2.0 * labels - 1, 2.0 * domains - 1], dim=1)
    weights = torch.tensor([[0.5], [0.5]], requires_grad=True)
    objective = DANN(task, features=1, domains=[0, 1], penalty=1.0, ramp_steps=0, width=16)
    adam = torch.optim.Adam(objective.parameters(), lr=0.02)

    def loss() -> torch.Tensor:
        features = inputs @ weights
        return objective.loss(Outputs(features, features, labels, domains), step=0)

    for _ in range(100):
        adam.zero_grad()
        loss().backward()
        adam.step()
    by_task = torch.autograd.grad(task.loss(inputs @ weights, labels), weights)[0]
    adversary = torch.autograd.grad(loss(), weights)[0] - by_task
    assert adversary[1] > 0.01, "going down makes less of the domain"
