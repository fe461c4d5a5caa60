"""Adaptive risk minimisation: a network that is trained, in episodes, to be adapted by its own way of adapting.

Source: Zhang et al., *Adaptive risk minimization: learning to adapt to domain shift*, NeurIPS 2021.
Notation: G episodes, of S support images each; R query images of all of them together; K outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from dmoe.models.student import Student


class Arm(nn.Module, ABC):
    """One of the three ways of adapting. Its parameters are all that is learned."""

    @abstractmethod
    def query_logits(self, support: Tensor, query: Sequence[Tensor]) -> Tensor:
        """Logits ``[R, K]`` of query images after adapting to the support images of their episode, with gradients through both.

        Args:
            support: ``[G, S, C, H, W]``, unlabeled.
            query: for each episode ``[Q, C, H, W]``, the R images in the order of the logits.
        """

    @abstractmethod
    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        """The student adapted to unlabeled images ``[B, C, H, W]`` of a domain; nothing else changes.

        Args:
            start: a student that this method returned before, to go on from where that means anything.
        """
