"""Statistics of the support in place of the source's."""

import pytest
import torch
from small_student import batch, features_by_batch, small_student, theta_of

from dmoe.baselines.batch_statistics import BatchStatistics


def test_the_support_comes_out_as_in_training_mode() -> None:
    student, images = small_student(), batch()
    adapted = BatchStatistics(student).adapt(images)
    torch.testing.assert_close(adapted.features(images), features_by_batch(theta_of(student), images), rtol=1e-11, atol=1e-12)


def test_other_images_are_normalised_by_the_support() -> None:
    student, images, other = small_student(), batch(), batch(1)
    adapted = BatchStatistics(student).adapt(images)
    maps = student.features[0](images).detach()
    norm = student.features[1]
    shift, scale = maps.mean(dim=(0, 2, 3)), norm.weight / (maps.var(dim=(0, 2, 3), correction=0) + norm.eps).sqrt()
    x = (student.features[0](other) - shift.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(adapted.features(other), student.features[2:](x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("source_weight", "old"), [(8.0, 0.5), (24.0, 0.75)])
def test_source_images_count_as_many(source_weight: float, old: float) -> None:
    student, images = small_student(), batch(8)
    source, pure, mixed = (
        one.features[1].running_mean
        for one in (student, *(BatchStatistics(student, source_weight=n).adapt(images) for n in (0.0, source_weight)))
    )
    torch.testing.assert_close(mixed, old * source + (1 - old) * pure)


def test_infinitely_many_source_images_leave_the_student_as_it_is() -> None:
    student, images = small_student(), batch()
    adapted = BatchStatistics(student, source_weight=1e15).adapt(images)
    torch.testing.assert_close(adapted.logits(images), student.logits(images))


def test_going_on_mixes_with_the_statistics_of_the_start() -> None:
    student, first, second = small_student(), batch(4), batch(4)
    method = BatchStatistics(student, source_weight=4)
    found = method.adapt(second, start=method.adapt(first)).features[1].running_mean
    means = [student.features[0](images).mean(dim=(0, 2, 3)) for images in (first, second)]
    expected = student.features[1].running_mean / 4 + means[0] / 4 + means[1] / 2
    torch.testing.assert_close(found, expected.detach())
