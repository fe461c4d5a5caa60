"""The WILDS data sets against the stock package: its splits, images and metrics; and every way in which files can be wrong."""

import csv
import functools
import itertools
import math
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from told import names, one_line
from torch import Tensor
from wilds_sample import CLASSES, WildsRoot

from dmoe.config import DataConfig
from dmoe.data import files
from dmoe.data.base import DomainDataset
from dmoe.data.files import ImageFiles
from dmoe.data.registry import load_dataset
from dmoe.data.wilds import load
from dmoe.data.wilds_import import fractional_seconds, wilds
from dmoe.errors import UserError
from dmoe.models.torchvision_import import torchvision

STOCK = {"iwildcam": "iwildcam", "camelyon": "camelyon17", "rxrx1": "rxrx1", "fmow": "fmow", "poverty": "poverty"}
CLASS_OF = {"iwildcam": "IWildCam", "camelyon": "Camelyon17", "rxrx1": "RxRx1", "fmow": "FMoW", "poverty": "PovertyMap"}
SPLITS = {"source": "train", "validation": "val", "target": "test", "id_validation": "id_val", "id_target": "id_test"}
LACKING = {"camelyon": {"id_target"}, "rxrx1": {"id_validation"}}
GROUP = {"iwildcam": "location", "camelyon": "slide", "rxrx1": "experiment", "fmow": "year", "poverty": "country"}
EPISODE = {**{name: [column] for name, column in GROUP.items()}, "fmow": ["region", "year"]}
TABLE = {**dict.fromkeys(STOCK, "metadata.csv"), "fmow": "rgb_metadata.csv", "poverty": "dhs_metadata.csv"}
SIZE = {"iwildcam": 448, "camelyon": 96, "rxrx1": 256, "fmow": 224, "poverty": 224}
GIGABYTES = {"iwildcam": 12, "camelyon": 11, "rxrx1": 7, "fmow": 54, "poverty": 13}
CASES = [(name, split) for name, split in itertools.product(STOCK, SPLITS) if split not in LACKING.get(name, ())]

Row = dict[str, str]


class Both:
    """Each data set as we open it and as the stock package alone does."""

    def __init__(self, root: WildsRoot) -> None:
        self.root = root

    @functools.cache  # noqa: B019 - the module's only object
    def ours(self, name: str) -> DomainDataset:
        return load(name, root=self.root(name))

    @functools.cache  # noqa: B019
    def stock(self, name: str) -> Any:
        return open_stock(name, self.root(name))

    def split(self, name: str, split: str) -> ImageFiles:
        found = self.ours(name).splits[split]
        assert isinstance(found, ImageFiles)
        return found

    def subset(self, name: str, split: str, transform: Callable[[Any], Tensor] | None = None) -> Any:
        return self.stock(name).get_subset(SPLITS[split], transform=transform)

    def rows(self, name: str, split: str) -> list[Row]:
        """The rows of the table that the stock package has in that split."""
        table, stock = read_table(self.root.folder(name) / TABLE[name]), self.stock(name)
        if name == "fmow":
            table = [table[i] for i in stock.full_idxs]
        return [table[i] for i in np.flatnonzero(stock.split_array == stock.split_dict[SPLITS[split]])]


def open_stock(name: str, root: Path, **choices: Any) -> Any:
    with fractional_seconds():
        return wilds().get_dataset(dataset=STOCK[name], root_dir=str(root), download=False, **choices)


def read_table(path: Path) -> list[Row]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write_table(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def some_of(count: int) -> Tensor:
    """A few image numbers in no order, among them the first and the last."""
    return torch.cat([torch.tensor([count - 1, 0]), torch.randint(count, (4,))])


@pytest.fixture(scope="module")
def both(wilds_root: WildsRoot) -> Both:
    return Both(wilds_root)


# What is in it


@pytest.mark.parametrize("name", STOCK)
def test_splits_are_those_that_the_stock_package_has(both: Both, name: str) -> None:
    assert set(both.ours(name).splits) == set(SPLITS) - LACKING.get(name, set())


@pytest.mark.parametrize(("name", "split"), CASES)
def test_labels_are_those_of_the_stock_split_in_its_order(both: Both, name: str, split: str) -> None:
    labels, expected = both.split(name, split).labels, both.subset(name, split).y_array
    assert labels.dtype == (torch.float32 if name == "poverty" else torch.int64)
    assert torch.equal(labels, expected.flatten())
    assert len(labels.unique()) > 1


@pytest.mark.parametrize(("name", "split"), CASES)
def test_domains_are_the_groups_of_the_stock_grouper(both: Both, name: str, split: str) -> None:
    from wilds.common.grouper import CombinatorialGrouper

    metadata = both.subset(name, split).metadata_array
    grouper = CombinatorialGrouper(both.stock(name), EPISODE[name])
    found = both.split(name, split)
    assert torch.equal(found.domains, grouper.metadata_to_group(metadata))
    column = both.stock(name).metadata_fields.index(GROUP[name])
    assert torch.equal(found.group_domains, metadata[:, column].long())
    assert found.domains.dtype == found.group_domains.dtype == torch.int64


def name_in_table(name: str, row: Row, region_of: dict[str, str]) -> str:
    """What people call the domain of a row."""
    if name == "fmow":
        return f"{region_of.get(row['country_code'], 'Other')}, {row['timestamp'][:4]}"
    if name == "iwildcam":
        return f"location {row['location_remapped']}"
    return f"slide {row['slide']}" if name == "camelyon" else row[GROUP[name]]


@pytest.mark.parametrize(("name", "split"), CASES)
def test_domain_names_say_what_the_table_says_of_each_image(both: Both, name: str, split: str) -> None:
    regions = {}
    if name == "fmow":
        regions = {row["alpha-3"]: row["region"] for row in read_table(both.root.folder(name) / "country_code_mapping.csv")}
    found = both.split(name, split)
    said = [found.domain_names[domain] for domain in found.domains.tolist()]
    assert said == [name_in_table(name, row, regions) for row in both.rows(name, split)]
    assert len(set(said)) == len(found.members)


@pytest.mark.parametrize("name", STOCK)
def test_target_domains_are_in_no_other_split_and_in_distribution_ones_are_source_domains(both: Both, name: str) -> None:
    domains = {split: set(found.members) for split, found in both.ours(name).splits.items()}
    assert not domains["target"] & (domains["source"] | domains["validation"])
    assert not domains["source"] & domains["validation"]
    assert domains.get("id_target", set()) | domains.get("id_validation", set()) <= domains["source"]


@pytest.mark.parametrize(
    ("name", "kind", "outputs", "classes"),
    [
        ("iwildcam", "multiclass", CLASSES, ["disc", "plus", "bars", "ring", "triangle", "four dots"]),
        ("camelyon", "binary", 1, ["normal", "tumor"]),
        ("rxrx1", "multiclass", CLASSES, ["0", "1", "2", "3", "4", "5"]),
        ("poverty", "regression", 1, []),
    ],
)
def test_task_has_as_many_outputs_as_the_data_set_has_classes(
    both: Both, name: str, kind: str, outputs: int, classes: list[str]
) -> None:
    dataset = both.ours(name)
    assert (dataset.task.kind, dataset.task.num_outputs, list(dataset.class_names)) == (kind, outputs, classes)


def test_fmow_has_all_its_classes_by_name_though_few_occur(both: Both) -> None:
    dataset = both.ours("fmow")
    assert (dataset.task.kind, dataset.task.num_outputs, len(dataset.class_names)) == ("multiclass", 62, 62)
    source = both.split("fmow", "source")
    said = [dataset.class_names[label] for label in source.labels.tolist()]
    assert said == [row["category"] for row in both.rows("fmow", "source")]
    assert len(set(said)) < 62


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("iwildcam", ["F1-macro_all", "acc_avg"]),
        ("camelyon", ["acc_avg"]),
        ("rxrx1", ["acc_avg"]),
        ("fmow", ["acc_worst_region", "acc_avg"]),
        ("poverty", ["r_wg", "r_all"]),
    ],
)
def test_selection_and_reported_metrics_are_those_of_the_paper(both: Both, name: str, keys: list[str]) -> None:
    dataset = both.ours(name)
    assert dataset.selection_metric == keys[0]
    assert list(dataset.reported) == keys


@pytest.mark.parametrize("name", STOCK)
def test_data_set_goes_by_the_names_of_its_makers(both: Both, name: str) -> None:
    dataset = both.ours(name)
    assert (dataset.name, dataset.official_name) == (name, STOCK[name])
    assert dataset.official_splits == SPLITS
    assert dataset.replicate == ("fold:A" if name == "poverty" else "")
    assert not dataset.in_memory
    assert list(dataset.unreadable) == []


@pytest.mark.parametrize("name", STOCK)
def test_stock_class_is_built_once(wilds_root: WildsRoot, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wilds()
    module = __import__(f"wilds.datasets.{STOCK[name]}_dataset", fromlist=["*"])
    stock_class, built = getattr(module, f"{CLASS_OF[name]}Dataset"), []
    original = stock_class.__init__

    def counted(self: Any, *arguments: Any, **keywords: Any) -> None:
        built.append(name)
        original(self, *arguments, **keywords)

    monkeypatch.setattr(stock_class, "__init__", counted)
    dataset = load(name, root=wilds_root(name))
    few = torch.arange(20)
    dataset.splits["source"].images(few[:1])
    dataset.metrics("validation", few, dataset.splits["validation"].labels[few])
    assert built == [name]


# Images


def pipeline(name: str, *, size: int | None = None, turn: Callable[[Image.Image], Image.Image] | None = None) -> Any:
    """The transforms of torchvision that METHOD's table of data sets asks for."""
    kinds = torchvision().transforms
    steps = [kinds.Resize((size or SIZE[name],) * 2), kinds.ToTensor()]
    if name == "rxrx1":
        steps.append(standardised)
    else:
        steps.append(kinds.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return kinds.Compose([turn, *steps] if turn else steps)


def standardised(image: Tensor) -> Tensor:
    """The public code's transform for rxrx1, on an image ``[C, H, W]``."""
    mean, std = image.mean(dim=(1, 2)), image.std(dim=(1, 2))
    std[std == 0] = 1.0
    normalized: Tensor = torchvision().transforms.functional.normalize(image, mean, std)
    return normalized


def assert_same_images(found: Tensor, expected: Tensor, name: str) -> None:
    """To the bit, but where statistics of an image are summed in another order."""
    assert found.dtype == torch.float32
    tolerance = 1e-5 if name == "rxrx1" else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("split", ["source", "target"])
@pytest.mark.parametrize("name", ["iwildcam", "camelyon", "rxrx1", "fmow"])
def test_images_are_those_of_a_stock_pipeline(both: Both, name: str, split: str) -> None:
    stock = both.subset(name, split, pipeline(name))
    index = some_of(len(stock))
    expected = torch.stack([stock[i][0] for i in index.tolist()])
    assert expected.shape[1:] == both.ours(name).image_shape == (3, SIZE[name], SIZE[name])
    assert_same_images(both.split(name, split).images(index), expected, name)


@pytest.mark.parametrize(("name", "size"), [("iwildcam", 32), ("camelyon", 200), ("rxrx1", 100), ("fmow", 64)])
def test_image_size_resizes_as_the_stock_pipeline_does(both: Both, name: str, size: int) -> None:
    dataset = load(name, root=both.root(name), image_size=size)
    stock = both.subset(name, "validation", pipeline(name, size=size))
    index = some_of(len(stock))
    expected = torch.stack([stock[i][0] for i in index.tolist()])
    assert expected.shape[1:] == dataset.image_shape == (3, size, size)
    assert_same_images(dataset.splits["validation"].images(index), expected, name)


def turn_of(view: int) -> Callable[[Image.Image], Image.Image]:
    """A picture turned by quarters against the clock, and then mirrored where ``view`` is 4 or more."""
    functional = torchvision().transforms.functional

    def turn(picture: Image.Image) -> Image.Image:
        turned = functional.rotate(picture, 90 * (view % 4))
        done: Image.Image = functional.hflip(turned) if view >= 4 else turned
        return done

    return turn


@pytest.mark.parametrize("view", range(8))
def test_stored_view_is_the_turned_picture_standardised(both: Both, view: int) -> None:
    stock = both.subset("rxrx1", "source", pipeline("rxrx1", turn=turn_of(view)))
    index = torch.tensor([5, 2])
    expected = torch.stack([stock[i][0] for i in index.tolist()])
    found = both.split("rxrx1", "source").images(index, view=torch.full((2,), view))
    assert_same_images(found, expected, "rxrx1")


def test_each_image_of_a_batch_has_its_own_view(both: Both) -> None:
    source, index, view = both.split("rxrx1", "source"), torch.tensor([3, 3, 7]), torch.tensor([0, 6, 1])
    one_by_one = torch.cat([source.images(index[i : i + 1], view=view[i : i + 1]) for i in range(3)])
    assert torch.equal(source.images(index, view=view), one_by_one)
    assert not torch.equal(one_by_one[0], one_by_one[1])


def test_fresh_draws_are_turns_and_a_function_of_the_draw(both: Both) -> None:
    source, index = both.split("rxrx1", "source"), torch.arange(16)
    drawn = source.images(index, draw=4)
    assert torch.equal(drawn, source.images(index, draw=4))
    views = torch.stack([source.images(index, view=torch.full((16,), view)) for view in range(8)])
    which = (views == drawn).flatten(2).all(dim=2)  # [view, image]
    assert which.sum(dim=0).tolist() == [1] * 16
    assert len(which.int().argmax(dim=0).unique()) > 3
    assert not torch.equal(drawn, source.images(index, draw=5))


@pytest.mark.parametrize("name", STOCK)
def test_only_source_images_of_rxrx1_have_several_views(both: Both, name: str) -> None:
    views = {split: found.views for split, found in both.ours(name).splits.items()}
    assert views == {split: 8 if (name, split) == ("rxrx1", "source") else 1 for split in views}


@pytest.mark.parametrize(("name", "split"), [("iwildcam", "source"), ("rxrx1", "validation")])
def test_draws_change_nothing_where_there_is_no_augmentation(both: Both, name: str, split: str) -> None:
    found, index = both.split(name, split), torch.tensor([1, 0])
    assert torch.equal(found.images(index, draw=3), found.images(index))


def test_channel_without_contrast_becomes_zero_whatever_its_level(wilds_root: WildsRoot, tmp_path: Path) -> None:
    wilds_root.copy("rxrx1", tmp_path)
    source = load("rxrx1", root=tmp_path).splits["source"]
    assert isinstance(source, ImageFiles)
    index = torch.arange(16)
    for number in index.tolist():
        path = source.path(number)
        pixels = np.array(Image.open(path))
        pixels[..., 2] = 15 * number
        path.unlink()
        Image.fromarray(pixels).save(path)
    images = source.images(index)
    assert images[:, 2].abs().amax(dim=(1, 2)).tolist() == pytest.approx([0.0] * 16, abs=1e-5)
    torch.testing.assert_close(images[:, :2].std(dim=(2, 3)), torch.ones(16, 2), rtol=0, atol=1e-5)


def test_grey_picture_among_coloured_ones_gets_three_equal_channels(wilds_root: WildsRoot, tmp_path: Path) -> None:
    wilds_root.copy("iwildcam", tmp_path)
    source = load("iwildcam", root=tmp_path).splits["source"]
    assert isinstance(source, ImageFiles)
    path = source.path(1)
    grey = Image.open(path).convert("L")
    path.unlink()
    grey.save(path)
    images = source.images(torch.tensor([0, 1]))
    assert images.shape == (2, 3, 448, 448)
    scale = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = images[1] * scale + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    torch.testing.assert_close(pixels[1:], pixels[:1].expand(2, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", ["source", "target"])
def test_poverty_images_are_the_arrays_in_the_files(both: Both, split: str) -> None:
    stock = both.subset("poverty", split)
    index = some_of(len(stock))
    arrays = []
    for row in stock.indices[index.numpy()]:
        with np.load(both.root.folder("poverty") / "images" / f"landsat_poverty_img_{row}.npz") as archive:
            arrays.append(torch.from_numpy(archive["x"].astype(np.float32)))
    assert both.ours("poverty").image_shape == (8, 224, 224)
    found = both.split("poverty", split).images(index)
    assert torch.equal(found, torch.stack(arrays))
    assert torch.equal(found, torch.stack([stock[i][0] for i in index.tolist()]))


def test_poverty_bands_are_resized_without_changing_their_mean(both: Both) -> None:
    small = load("poverty", root=both.root("poverty"), image_size=56).splits["source"].images(torch.tensor([2]))
    assert small.shape == (1, 8, 56, 56)
    whole = both.split("poverty", "source").images(torch.tensor([2]))
    torch.testing.assert_close(small.mean(dim=(2, 3)), whole.mean(dim=(2, 3)), rtol=0, atol=0.02)


# Metrics


def guesses(labels: Tensor) -> Tensor:
    """Predictions of which about half are right; for values: noisy ones."""
    if labels.is_floating_point():
        return labels + torch.randn(len(labels))
    wrong = torch.rand(len(labels)) < 0.5
    return torch.where(wrong, labels[torch.randperm(len(labels))], labels)


def stock_metrics(stock: Any, predictions: Tensor, labels: Tensor, metadata: Tensor) -> Any:
    """What ``eval`` of the stock package says, to compare with."""
    found, _ = stock.eval(predictions.view_as(labels), labels, metadata)
    return pytest.approx({key: float(value) for key, value in found.items()}, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(("name", "split"), CASES)
def test_metrics_are_those_of_the_stock_package(both: Both, name: str, split: str) -> None:
    subset, predictions = both.subset(name, split), guesses(both.split(name, split).labels)
    found = both.ours(name).metrics(split, torch.arange(len(subset)), predictions)
    assert dict(found) == stock_metrics(both.stock(name), predictions, subset.y_array, subset.metadata_array)
    assert set(both.ours(name).reported) <= set(found)


@pytest.mark.parametrize("name", STOCK)
def test_metrics_of_some_images_are_of_their_rows(both: Both, name: str) -> None:
    subset = both.subset(name, "target")
    index = torch.randperm(len(subset))[: len(subset) // 2]
    predictions = guesses(both.split(name, "target").labels[index])
    found = both.ours(name).metrics("target", index, predictions)
    assert dict(found) == stock_metrics(both.stock(name), predictions, subset.y_array[index], subset.metadata_array[index])
    others = both.ours(name).metrics("target", torch.arange(len(index)), predictions)
    assert dict(others) != dict(found)


@pytest.mark.parametrize("predicted", [0.5, math.nan, math.inf])
def test_correlation_of_useless_predictions_is_not_a_number(both: Both, predicted: float) -> None:
    count = len(both.split("poverty", "validation"))
    found = both.ours("poverty").metrics("validation", torch.arange(count), torch.full((count,), predicted))
    assert math.isnan(found["r_wg"]) and math.isnan(found["r_all"])


def test_correlation_of_a_single_image_is_not_a_number(both: Both) -> None:
    found = both.ours("poverty").metrics("validation", torch.tensor([7]), torch.tensor([0.5]))
    assert math.isnan(found["r_wg"])


# Choices, and what they change


def test_fold_chooses_the_countries(both: Both) -> None:
    from wilds.datasets.poverty_dataset import SURVEY_NAMES

    dataset = load("poverty", root=both.root("poverty"), fold="C")
    countries = {split: {found.domain_names[d] for d in found.members} for split, found in dataset.splits.items()}
    survey = SURVEY_NAMES["2009-17C"]
    assert {split: countries[split] for split in ("source", "validation", "target")} == {
        "source": set(survey["train"]),
        "validation": set(survey["val"]),
        "target": set(survey["test"]),
    }
    assert dataset.replicate == "fold:C"
    assert dataset.fingerprint != both.ours("poverty").fingerprint


def test_fold_means_nothing_to_the_others(both: Both) -> None:
    dataset = load("camelyon", root=both.root("camelyon"), fold="C")
    assert (dataset.fingerprint, dataset.replicate) == (both.ours("camelyon").fingerprint, "")


def test_fingerprint_knows_name_contents_and_size_and_not_the_place(both: Both, tmp_path: Path) -> None:
    folder = both.root.copy("camelyon", tmp_path)
    known = [both.ours(name).fingerprint for name in STOCK]
    assert load("camelyon", root=tmp_path).fingerprint == both.ours("camelyon").fingerprint
    known.append(load("camelyon", root=tmp_path, image_size=32).fingerprint)
    rows = read_table(folder / "metadata.csv")
    rows[4]["tumor"] = str(1 - int(rows[4]["tumor"]))
    write_table(folder / "metadata.csv", rows)
    known.append(load("camelyon", root=tmp_path).fingerprint)
    assert len(set(known)) == len(known)


def test_command_line_name_opens_it_by_its_configuration(both: Both) -> None:
    config = DataConfig(dir=both.root("camelyon"), image_size=40, source_images_per_domain=3)
    dataset = load_dataset("camelyon", config)
    assert dataset.image_shape == (3, 40, 40)
    assert {len(members) for members in dataset.splits["source"].members.values()} == {3}
    assert len(dataset.splits["target"]) == len(both.split("camelyon", "target"))


# Files that are not as they should be


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlretrieve", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", STOCK)
def test_download_is_announced_and_its_failure_names_the_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(name, root=tmp_path)
    (announced,) = capsys.readouterr().out.splitlines()
    assert announced.startswith(f"{name}: not found in {tmp_path}; downloading {GIGABYTES[name]} GB from https://")
    assert announced.endswith("(another place: --data_dir)")
    message = one_line(caught)
    assert message.startswith(f"{name}: could not be downloaded (<urlopen error no route to host>); copy it by hand: ")
    assert f"the stock layout is {tmp_path}/{STOCK[name]}_v" in message
    assert "RELEASE_v" in message and TABLE[name] in message
    assert names(tmp_path) == []


def test_nothing_is_fetched_where_that_was_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=tmp_path / "data", download=False)
    assert one_line(caught).startswith(f"iwildcam: not found in {tmp_path / 'data'}; a run fetches 12 GB from https://")
    assert names(tmp_path) == [] and capsys.readouterr().out == ""


def test_source_groups_have_names_of_their_own(both: Both) -> None:
    """fmow's experts share years, its episodes are of a year and a region."""
    split = load("fmow", root=both.root("fmow")).splits["source"]
    assert {int(year): name for year, name in split.group_names.items()} == {year: str(2002 + year) for year in split.group_names}
    assert set(split.group_names) >= set(split.group_domains.tolist())


@pytest.mark.usefixtures("no_network")
def test_empty_folder_of_the_data_set_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "iwildcam_v2.0").mkdir()
    with pytest.raises(UserError, match="could not be downloaded"):
        load("iwildcam", root=tmp_path)


@pytest.mark.usefixtures("no_network")
def test_root_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=tmp_path / "data")
    assert one_line(caught).startswith("iwildcam: could not be downloaded (")
    assert (tmp_path / "data").read_text() == "mine"


@pytest.mark.parametrize(
    "ending", [urllib.error.URLError("reset"), urllib.error.ContentTooShortError("short", b""), OSError(28, "")]
)
def test_half_a_download_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: Exception) -> None:
    def half(url: str, path: str, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half an archive")
        raise ending

    monkeypatch.setattr(urllib.request, "urlretrieve", half)
    with pytest.raises(UserError, match="could not be downloaded"):
        load("rxrx1", root=tmp_path)
    assert names(tmp_path) == []


def test_interrupted_download_starts_anew_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(url: str, path: str, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half an archive")
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib.request, "urlretrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("rxrx1", root=tmp_path)
    assert names(tmp_path) == []


def test_what_is_downloaded_is_opened(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, path: str, *_: Any, **__: Any) -> None:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(both.root.folder("camelyon"), arcname=".")

    monkeypatch.setattr(urllib.request, "urlretrieve", fetch)
    dataset = load("camelyon", root=tmp_path / "not there yet")
    assert dataset.fingerprint == both.ours("camelyon").fingerprint
    assert names(tmp_path / "not there yet") == ["camelyon17_v1.0"]
    monkeypatch.setattr(urllib.request, "urlretrieve", None)
    load("camelyon", root=tmp_path / "not there yet")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("empty", [False, True])
def test_folder_of_another_version_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: bool) -> None:
    (tmp_path / "iwildcam_v1.0").mkdir()
    if empty:
        (tmp_path / "iwildcam_v2.0").mkdir()
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=tmp_path)
    message = one_line(caught)
    assert message.startswith(f"{tmp_path}: holds iwildcam_v1.0, but version 2.0 is needed: the stock layout is ")
    assert capsys.readouterr().out == ""
    assert "iwildcam_v1.0" in names(tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", STOCK)
def test_folder_without_its_release_note_is_told_and_left_alone(wilds_root: WildsRoot, tmp_path: Path, name: str) -> None:
    release = next(wilds_root.folder(name).glob("RELEASE*")).name
    folder = tmp_path / wilds_root.folder(name).name
    folder.mkdir()
    (folder / TABLE[name]).write_text("mine")
    with pytest.raises(UserError) as caught:
        load(name, root=tmp_path)
    message = one_line(caught)
    assert message.startswith(f"{folder}: not a whole copy of {STOCK[name]} ")
    assert f"{release} is missing: the stock layout is {folder}/" in message
    assert (folder / TABLE[name]).read_text() == "mine"


NEEDED_COLUMN = {"iwildcam": "location_remapped", "camelyon": "slide", "rxrx1": "sirna_id", "fmow": "timestamp"}


@pytest.mark.parametrize("damage", ["missing", "empty", "without a column", "without rows", "not a table"])
@pytest.mark.parametrize("name", NEEDED_COLUMN)
def test_damaged_table_is_told_with_the_layout(wilds_root: WildsRoot, tmp_path: Path, name: str, damage: str) -> None:
    folder = wilds_root.copy(name, tmp_path)
    path = folder / TABLE[name]
    rows = read_table(path)
    path.unlink()
    if damage == "empty":
        path.write_text("")
    elif damage == "without a column":
        write_table(path, [{key: value for key, value in row.items() if key != NEEDED_COLUMN[name]} for row in rows])
    elif damage == "without rows":
        path.write_text(",".join(rows[0]) + "\n")
    elif damage == "not a table":
        path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UserError) as caught:
        load(name, root=tmp_path)
    message = one_line(caught)
    assert message.startswith(f"{folder}: the stock wilds package cannot read it: ")
    assert f"the stock layout is {folder}/" in message and path.name in message
    if damage == "without a column":
        assert NEEDED_COLUMN[name] in message
    assert {"RELEASE_v", "images", "patches", "train"} & {entry[:9] for entry in names(folder)}


def test_split_without_images_is_told(wilds_root: WildsRoot, tmp_path: Path) -> None:
    path = wilds_root.copy("iwildcam", tmp_path) / "metadata.csv"
    write_table(path, [{**row, "split": "train" if row["split"] == "val" else row["split"]} for row in read_table(path)])
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=tmp_path)
    assert one_line(caught) == f"{path}: the val split holds no images, and so no domains: bring back that of the release"


@pytest.fixture
def damaged(wilds_root: WildsRoot, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A copy of iwildcam where two source images are gone and one is cut off, and the three paths in the order of the table."""
    folder = wilds_root.copy("iwildcam", tmp_path)
    train = [f"train/{row['filename']}" for row in read_table(folder / "metadata.csv") if row["split"] == "train"]
    first, cut_off, last = train[3], train[10], train[-1]
    (folder / first).unlink()
    (folder / last).unlink()
    content = (folder / cut_off).read_bytes()
    (folder / cut_off).unlink()
    (folder / cut_off).write_bytes(content[: len(content) // 2])
    yield folder, [first, cut_off, last]


def test_missing_images_are_told_by_the_first_and_how_many_more(damaged: tuple[Path, list[str]]) -> None:
    folder, (first, _, last) = damaged
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=folder.parent)
    message = one_line(caught)
    assert message.startswith(f"{folder / first}: the metadata has a row for it, but there is no such image, and 1 others: ")
    assert "data.skip_unreadable=true" in message
    (folder / first).write_bytes(b"there again")
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=folder.parent)
    assert one_line(caught).startswith(f"{folder / last}: the metadata has a row for it, but there is no such image: ")


def test_images_that_cannot_be_read_are_left_out_where_that_is_asked_for(both: Both, damaged: tuple[Path, list[str]]) -> None:
    folder, bad = damaged
    dataset = load("iwildcam", root=folder.parent, skip_unreadable=True)
    assert list(dataset.unreadable) == bad
    source, whole = dataset.splits["source"], both.split("iwildcam", "source")
    left = [i for i in range(len(whole)) if str(whole.path(i).relative_to(both.root.folder("iwildcam"))) not in bad]
    assert len(source) == len(left) == len(whole) - 3
    assert torch.equal(source.labels, whole.labels[left])
    assert torch.equal(source.domains, whole.domains[left])
    images = source.images(torch.arange(len(source))[-4:])
    assert torch.equal(images, whole.images(torch.tensor(left[-4:])))
    assert dataset.fingerprint != both.ours("iwildcam").fingerprint
    predictions = guesses(source.labels)
    subset = both.subset("iwildcam", "source")
    found = dataset.metrics("source", torch.arange(len(source)), predictions)
    assert dict(found) == stock_metrics(both.stock("iwildcam"), predictions, subset.y_array[left], subset.metadata_array[left])


def test_nothing_is_left_out_of_a_whole_copy(both: Both) -> None:
    dataset = load("camelyon", root=both.root("camelyon"), skip_unreadable=True)
    assert list(dataset.unreadable) == []
    assert dataset.fingerprint == both.ours("camelyon").fingerprint


def test_known_unreadable_images_are_left_out_without_reading_any(
    damaged: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = damaged
    found = load("iwildcam", root=folder.parent, skip_unreadable=True)

    def read(path: Path, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(files, "read_pixels", read)
    known = load("iwildcam", root=folder.parent, skip_unreadable=True, known_unreadable=bad)
    assert list(known.unreadable) == bad
    assert known.fingerprint == found.fingerprint
    assert torch.equal(known.splits["source"].labels, found.splits["source"].labels)


def test_cut_off_image_is_told_when_it_is_read(wilds_root: WildsRoot, tmp_path: Path) -> None:
    wilds_root.copy("iwildcam", tmp_path)
    source = load("iwildcam", root=tmp_path).splits["source"]
    assert isinstance(source, ImageFiles)
    path = source.path(6)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    source.images(torch.tensor([5, 7]))
    with pytest.raises(UserError) as caught:
        source.images(torch.tensor([5, 6]))
    message = one_line(caught)
    assert message.startswith(f"{path}: cannot be read as an image: ")
    assert "data.skip_unreadable=true" in message


def test_split_of_which_no_image_can_be_read_is_told(wilds_root: WildsRoot, tmp_path: Path) -> None:
    folder = wilds_root.copy("iwildcam", tmp_path)
    for row in read_table(folder / "metadata.csv"):
        if row["split"] == "test":
            (folder / "train" / row["filename"]).unlink()
    with pytest.raises(UserError) as caught:
        load("iwildcam", root=tmp_path, skip_unreadable=True)
    assert one_line(caught).startswith(f"{folder / 'metadata.csv'}: the test split holds no images")


@pytest.mark.parametrize("absent", ["wilds", "wilds.datasets.camelyon17_dataset"])
def test_package_that_cannot_be_imported_is_told(wilds_root: WildsRoot, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    root = wilds_root("camelyon")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UserError) as caught:
        load("camelyon", root=root)
    message = one_line(caught)
    assert message.startswith("camelyon: the package wilds cannot be imported (")
    assert message.endswith("pip install wilds")
