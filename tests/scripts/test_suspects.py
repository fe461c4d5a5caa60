"""Counts of suspect batches: the table, and what the batches are."""

from types import SimpleNamespace
from typing import cast

import torch

import dmoe
from dmoe.data import digits
from dmoe.data.transforms import ImageTransform
from dmoe.diagnosis import Ranges
from scripts import suspects


def test_the_table_has_a_row_a_kind_and_a_column_a_run() -> None:
    table = suspects.table({"s1": {"honest": (1, 16), "noise": (8, 8)}, "s2": {"honest": (0, 16)}})
    assert table.splitlines() == [
        "| suspect batches | s1 | s2 |",
        "|---|---|---|",
        "| honest | 1 of 16 | 0 of 16 |",
        "| noise | 8 of 8 | - |",
    ]


def test_batches_are_images_of_the_model_and_are_what_they_are_called() -> None:
    size, dataset = 16, digits.load()
    model = cast(dmoe.Model, SimpleNamespace(ranges=Ranges({}, images=size), transform=ImageTransform((1, 14, 14))))
    target = dataset.splits["target"]
    kinds = {name: make() for name, make in {**suspects.honest(model, dataset), **suspects.made_up(model, dataset)}.items()}
    for name, batches in kinds.items():
        fewer = {"target domains, their first 8 images": 8, "target domains, their first 4 images": 4}
        fewer |= {"target domains, their first 2 images": 2, "one image": 1}
        assert {tuple(images.shape) for images in batches} == {(fewer.get(name, size), 1, 14, 14)}, name
        assert all(images.isfinite().all() for images in batches), name
    first = target.images(target.members[90][:size])
    assert torch.equal(kinds["target domains, their first 16 images"][0], first)
    assert len(kinds["target domains, all batches"]) == 16 * (1500 // size)
    assert len(kinds["one class only"]) == 16 * 10
    assert torch.equal(kinds["one class only"][3][0], target.images(target.members[90][target.labels[target.members[90]] == 3])[0])
    assert all(len(images.unique()) == 1 for images in kinds["constant images, one grey"])
    assert all((images == images[:, :, :1, :1]).all() for images in kinds["constant images, many greys"])
    assert all(images.min() >= 0 and images.max() <= 1 for images in kinds["scikit-learn's digits"])
    assert torch.equal(kinds["half of them from another domain"][0][: size // 2], first[: size // 2])
    assert not torch.equal(kinds["half of them from another domain"][0], first)
