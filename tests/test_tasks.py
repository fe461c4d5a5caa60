"""Losses, predictions and metrics of the three tasks, against numbers worked out here."""

import math

import pytest
import torch

from dmoe.tasks import Task

MULTICLASS = Task("multiclass", num_outputs=3)
BINARY = Task("binary", num_outputs=1)
REGRESSION = Task("regression", num_outputs=1)


def test_multiclass_loss_is_the_mean_negative_log_probability() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    first = -math.log(math.exp(3) / (math.exp(1) + math.exp(2) + math.exp(3)))
    assert MULTICLASS.loss(logits, torch.tensor([2, 1])).item() == pytest.approx((first + math.log(3)) / 2)


def test_binary_loss_is_the_mean_negative_log_probability_of_one_logit() -> None:
    logits = torch.tensor([[2.0], [-1.0]])
    expected = (-math.log(1 / (1 + math.exp(-2))) - math.log(1 / (1 + math.exp(1)))) / 2
    assert BINARY.loss(logits, torch.tensor([1, 1])).item() == pytest.approx(expected)


def test_binary_loss_keeps_the_precision_of_the_logits() -> None:
    assert BINARY.loss(torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([1])).dtype == torch.float64


def test_regression_loss_is_the_mean_squared_error_image_by_image() -> None:
    assert REGRESSION.loss(torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 1.0])).item() == pytest.approx((1 + 9) / 2)


def test_multiclass_prediction_is_the_largest_logit() -> None:
    assert MULTICLASS.predictions(torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])).tolist() == [1, 0]


def test_binary_prediction_is_class_1_above_a_logit_of_0() -> None:
    assert BINARY.predictions(torch.tensor([[1e-6], [0.0], [-1e-6]])).tolist() == [1, 0, 0]


def test_regression_prediction_is_the_output() -> None:
    assert REGRESSION.predictions(torch.tensor([[1.5], [-2.0]])).tolist() == [1.5, -2.0]


def test_multiclass_probabilities_are_a_softmax() -> None:
    probabilities = MULTICLASS.probabilities(torch.tensor([[0.0, 0.0, math.log(2)]]))
    torch.testing.assert_close(probabilities, torch.tensor([[0.25, 0.25, 0.5]]))


def test_binary_probabilities_are_of_both_classes() -> None:
    torch.testing.assert_close(BINARY.probabilities(torch.tensor([[math.log(3)]])), torch.tensor([[0.25, 0.75]]))


def test_a_regression_has_values_in_place_of_probabilities() -> None:
    assert REGRESSION.probabilities(torch.tensor([[7.0]])).tolist() == [[7.0]]


def test_accuracy_is_the_share_of_right_predictions() -> None:
    assert MULTICLASS.metrics(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))["accuracy"] == pytest.approx(3 / 4)


def test_macro_f1_is_over_the_classes_that_occur_in_the_labels() -> None:
    """Class 0: precision 1, recall 1/2, F1 2/3. Class 1: F1 1. Class 2 is predicted once, and never true."""
    metrics = MULTICLASS.metrics(torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_class_that_is_never_predicted_has_an_f1_of_0() -> None:
    assert MULTICLASS.metrics(torch.tensor([0, 0]), torch.tensor([0, 1]))["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_regression_is_judged_by_correlation_and_squared_error() -> None:
    """Values 1, 2, 3 and predictions 2, 4, 3: covariance 1/2, variances 1 and 1."""
    metrics = REGRESSION.metrics(torch.tensor([2.0, 4.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert metrics == {"r": pytest.approx(0.5), "mse": pytest.approx((1 + 4 + 0) / 3)}


@pytest.mark.parametrize("predictions", [[2.0], [2.0, 2.0], [2.0, 2.0, 2.0]])
def test_there_is_no_correlation_of_one_image_or_of_equal_predictions(predictions: list[float]) -> None:
    labels = torch.arange(len(predictions)).float()
    assert math.isnan(REGRESSION.metrics(torch.tensor(predictions), labels)["r"])


@pytest.mark.parametrize("task", [MULTICLASS, BINARY, REGRESSION])
def test_the_headline_is_one_of_the_metrics(task: Task) -> None:
    values = torch.tensor([0.0, 1.0]) if task.kind == "regression" else torch.tensor([0, 1])
    assert task.headline in task.metrics(values, values)
