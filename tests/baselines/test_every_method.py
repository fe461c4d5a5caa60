"""What holds for every method that adapts at test time."""

import copy
from collections.abc import Callable

import pytest
import torch
from small_student import batch, normless_student, small_student, state_of
from torch import Tensor, nn

from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.baselines.eata import Eata
from dmoe.baselines.lame import Lame
from dmoe.baselines.memo import Memo
from dmoe.baselines.sar import Sar
from dmoe.baselines.shot_im import ShotIm
from dmoe.baselines.t3a import T3a
from dmoe.baselines.tent import Tent
from dmoe.baselines.unadapted import Unadapted
from dmoe.errors import UserError
from dmoe.evaluation import Method
from dmoe.models.student import Student
from dmoe.tasks import Task

SOURCE = torch.linspace(-2, 2, 5 * 72, dtype=torch.float64).view(5, 2, 6, 6)
Make = Callable[[Student], Method]
REMEMBERING: dict[str, Make] = {
    "batch statistics": lambda student: BatchStatistics(student, source_weight=4),
    "TENT": lambda student: Tent(student, lr=0.01, steps=3),
    "TENT, SGD": lambda student: Tent(student, lr=0.1, steps=3, optimizer="sgd"),
    "SHOT-IM": lambda student: ShotIm(student, lr=0.01, steps=3),
    "T3A": lambda student: T3a(student, supports_per_class=2),
    "EATA": lambda student: Eata(student, source=SOURCE, lr=0.1, steps=3, certain=1.0, redundant=2.0),
    "SAR": lambda student: Sar(student, lr=0.1, steps=3, certain=1.0, recovery=0.0),
}
FORGETFUL: dict[str, Make] = {"LAME": Lame, "LAME, rbf": lambda student: Lame(student, affinity="rbf"), "MEMO": Memo}
ADAPTING = REMEMBERING | FORGETFUL
ALL: dict[str, Make] = {**ADAPTING, "ERM": Unadapted}

every_method = pytest.mark.parametrize("name", ALL)
adapting = pytest.mark.parametrize("name", ADAPTING)


@every_method
def test_adapting_and_predicting_change_nothing(name: str) -> None:
    student, images, more = small_student(), batch(), batch()
    before, images_before = state_of(student), images.clone()
    method = ALL[name](student)
    first = method.adapt(images)
    first_before, predicted = state_of(first), first.logits(more)
    second = method.adapt(more, start=first)
    second.logits(images)
    assert state_of(student) == before and torch.equal(images, images_before)
    assert state_of(first) == first_before and torch.equal(first.logits(more), predicted)
    assert torch.equal(method.adapt(images).logits(more), predicted), "and the same call gives the same"
    assert torch.equal(method.adapt(more, start=first).logits(images), second.logits(images))


@adapting
def test_adapting_changes_what_is_predicted(name: str) -> None:
    student, images = small_student(), batch()
    assert (ADAPTING[name](student).adapt(images).predict(images) - student.predict(images)).abs().max() > 1e-4


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_the_gradient_mode_around_it_does_not_matter_and_logits_carry_no_graph(
    name: str, mode: Callable[[], torch.no_grad]
) -> None:
    method, images = ALL[name](small_student()), batch()
    expected = method.adapt(images).logits(images)
    with mode():
        found = method.adapt(images).logits(images)
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize("name", REMEMBERING)
def test_it_goes_on_from_a_student_that_it_returned(name: str) -> None:
    method, images = REMEMBERING[name](small_student()), batch()
    start = method.adapt(3 * batch())
    assert not torch.allclose(method.adapt(images, start=start).predict(images), method.adapt(images).predict(images), rtol=1e-6)


@pytest.mark.parametrize("name", FORGETFUL)
def test_nothing_to_go_on_from_changes_nothing(name: str) -> None:
    method, images = FORGETFUL[name](small_student()), batch()
    assert torch.equal(method.adapt(images, start=method.adapt(batch())).logits(images), method.adapt(images).logits(images))


@every_method
def test_a_binary_task_has_one_logit(name: str) -> None:
    student, images = small_student("binary"), batch()
    adapted = ALL[name](student).adapt(images)
    assert adapted.logits(images).shape == (len(images), 1)
    assert adapted.predict(images).shape == (len(images), 2)


@pytest.mark.parametrize("name", [name for name in ADAPTING if name not in ("LAME, rbf", "MEMO", "T3A")])
def test_a_binary_task_is_one_of_two_classes(name: str) -> None:
    """The same network with its logit beside a logit of zero says the same."""
    student, images = small_student("binary"), batch()
    head = nn.Linear(student.head.in_features, 2).double()
    with torch.no_grad():
        head.weight.copy_(torch.cat([torch.zeros_like(student.head.weight), student.head.weight]))
        head.bias.copy_(torch.cat([torch.zeros_like(student.head.bias), student.head.bias]))
    twin = Student(features=student.features, head=head, task=Task("multiclass", 2))
    found, expected = (ADAPTING[name](one).adapt(images).predict(images) for one in (student, twin))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ADAPTING if name != "batch statistics"])
def test_a_regression_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^[A-Z0-9]+(-IM)?: needs classes; this task is a regression: "):
        ADAPTING[name](small_student("regression"))


@pytest.mark.parametrize("name", ["TENT", "EATA", "SAR"])
def test_a_network_without_layers_of_normalisation_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: adapts layers of normalisation"):
        ADAPTING[name](normless_student())


@pytest.mark.parametrize("name", ["batch statistics", "SHOT-IM", "T3A", "LAME", "MEMO", "ERM"])
def test_the_others_take_such_a_network(name: str) -> None:
    images = batch()
    assert ALL[name](normless_student()).adapt(images).logits(images).isfinite().all()


@every_method
def test_one_image_is_enough(name: str) -> None:
    image = batch(1)
    assert ALL[name](small_student()).adapt(image).logits(image).isfinite().all()


@every_method
@pytest.mark.parametrize("batch_size", [1, 5])
def test_images_are_predicted_in_any_portions(name: str, batch_size: int) -> None:
    student, images = ALL[name](small_student()).adapt(batch(4)), batch(11)
    torch.testing.assert_close(student.logits(images, batch_size=batch_size), student.logits(images), rtol=1e-9, atol=1e-10)


@every_method
def test_a_copy_of_the_student_is_adapted_alike(name: str) -> None:
    student, images = small_student(), batch()
    twin = Student(features=copy.deepcopy(student.features).train(), head=student.head, task=student.task)
    logits: list[Tensor] = [ALL[name](one).adapt(images).logits(images) for one in (student, twin)]
    assert torch.equal(*logits)
