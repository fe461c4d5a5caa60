"""No adaptation: the student as it is."""

from torch import Tensor

from dmoe.models.student import Student


class Unadapted:
    """Behind :class:`~dmoe.adaptation.Adapter`'s call, the same student for every domain."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        return start or self._student
