"""What is learned: the loss, the prediction and the metrics of a task.

Notation: B images, K outputs of the network (K classes; 1 for a binary task or a regression).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TaskKind = Literal["multiclass", "binary", "regression"]


@dataclass(frozen=True)
class Task:
    """One of the three tasks of METHOD: cross-entropy, BCE on one logit, or mean squared error.

    Attributes:
        kind: which of the three.
        num_outputs: K, the width of the head.
    """

    kind: TaskKind
    num_outputs: int

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Task":
        """What :func:`dataclasses.asdict` made.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        kind, num_outputs = facts["kind"], facts["num_outputs"]
        if kind not in get_args(TaskKind) or type(num_outputs) is not int or num_outputs < 1:
            raise ValueError(f"a task {kind!r} of {num_outputs!r} outputs")
        return cls(kind, num_outputs)

    @property
    def headline(self) -> str:
        """The key of :meth:`metrics` that says most, higher is better."""
        return "r" if self.kind == "regression" else "accuracy"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean task loss of logits ``[B, K]`` against labels ``[B]``."""
        if self.kind == "multiclass":
            return F.cross_entropy(logits, labels)
        values = labels.to(logits.dtype)
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(logits.squeeze(1), values)
        return F.mse_loss(logits.squeeze(1), values)

    def predictions(self, logits: Tensor) -> Tensor:
        """Predictions ``[B]``: the class (binary: 1 where the logit is above 0), or the value for a regression."""
        if self.kind == "multiclass":
            return logits.argmax(dim=1)
        if self.kind == "binary":
            return (logits.squeeze(1) > 0).long()
        return logits.squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities ``[B, K]`` (binary: ``[B, 2]``); the values ``[B, 1]`` themselves for a regression."""
        if self.kind == "multiclass":
            return logits.softmax(dim=1)
        if self.kind == "binary":
            positive = logits.sigmoid()
            return torch.cat([1 - positive, positive], dim=1)
        return logits

    def metrics(self, predictions: Tensor, labels: Tensor) -> Mapping[str, float]:
        """Metrics over all given images, in [0, 1] for classes; of values, Pearson's r and the mean squared error.

        Macro F1 is over the classes that occur in ``labels``, as WILDS computes it for iwildcam. r is not a number where
        there are fewer than two images, or all values are equal.
        """
        from sklearn.metrics import accuracy_score, f1_score

        y, p = labels.numpy(), predictions.numpy()
        if self.kind == "regression":
            y, p = y.astype(np.float64), p.astype(np.float64)
            varied = len(y) > 1 and np.ptp(y) > 0 and np.ptp(p) > 0
            r = float(np.corrcoef(y, p)[0, 1]) if varied else math.nan
            return {"r": r, "mse": float(np.mean((y - p) ** 2))}
        return {
            "accuracy": float(accuracy_score(y, p)),
            "macro_f1": float(f1_score(y, p, labels=labels.unique().numpy(), average="macro", zero_division=0)),
        }
