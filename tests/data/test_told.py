"""Images that say their domain: channels of constants behind those of the image, the same in every view and draw."""

from pathlib import Path

import pytest
import torch
from noise import run_in

from dmoe.data import digits
from dmoe.data.base import DomainDataset
from dmoe.data.told import told_domain
from dmoe.errors import UserError


@pytest.fixture(scope="module")
def dataset() -> DomainDataset:
    return digits.load().with_fewer_source_images(20)


@pytest.mark.parametrize("split", ["source", "validation", "target"])
@pytest.mark.parametrize("draw", [None, 3])
def test_numbers_of_the_domain_are_channels_behind_the_image(dataset: DomainDataset, split: str, draw: int | None) -> None:
    plain, told = dataset.splits[split], told_domain(dataset).splits[split]
    index = torch.arange(0, len(plain), len(plain) // 7)
    images = told.images(index, draw=draw)
    assert torch.equal(images[:, :1], plain.images(index, draw=draw))
    assert plain.descriptors is not None
    for image, domain in zip(images, plain.domains[index].tolist(), strict=True):
        assert torch.equal(image[1:], plain.descriptors[domain][:, None, None].expand(3, 14, 14))


def test_what_readers_send_is_what_images_are(dataset: DomainDataset) -> None:
    told, index = told_domain(dataset).splits["source"], torch.tensor([3, 100])
    assert torch.equal(told.finish(told.pixels(index, draw=5)), told.images(index, draw=5))


def test_all_else_is_as_before(dataset: DomainDataset) -> None:
    told = told_domain(dataset)
    assert told.image_shape == (4, 14, 14)
    assert told.task == dataset.task
    assert told.fingerprint != dataset.fingerprint
    for name, split in told.splits.items():
        plain = dataset.splits[name]
        assert torch.equal(split.labels, plain.labels) and torch.equal(split.domains, plain.domains)
        assert split.domain_names == plain.domain_names and split.name(3) == plain.name(3)


def test_data_set_that_knows_no_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^noise: no numbers are known that describe its domains"):
        told_domain(run_in(tmp_path).dataset)
