"""The synthetic WILDS sets: stock wilds opens them, they are shaped like the real ones, and there is something to learn."""

import csv
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dmoe.command_line import run_main
from scripts import make_wilds_sample as script
from scripts.make_wilds_sample import RELEASES, Options, main, rows_per_country

CONTENTS = {
    "iwildcam": Options(images_per_domain=24, classes=6, seed=0, size=64),
    "camelyon": Options(images_per_domain=10, classes=6, seed=0, size=64),
    "rxrx1": Options(images_per_domain=10, classes=6, seed=0, size=64),
    "fmow": Options(images_per_domain=5, classes=6, seed=0, size=64),
    "poverty": Options(images_per_domain=4, classes=6, seed=0, size=64),
}
DOMAIN = {
    "iwildcam": ("location",),
    "camelyon": ("slide",),
    "rxrx1": ("experiment",),
    "fmow": ("year", "region"),
    "poverty": ("country",),
}
FEW = CONTENTS["poverty"]


class Samples:
    """One written folder of every set, opened by stock wilds when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, options in CONTENTS.items():
            RELEASES[name].make(root, options)
        self._opened: dict[tuple[str, str], Any] = {}

    def folder(self, name: str) -> Path:
        return RELEASES[name].folder(self.root)

    def open(self, name: str, fold: str = "A") -> Any:
        if (name, fold) not in self._opened:
            self._opened[name, fold] = stock(name, self.root, fold)
        return self._opened[name, fold]

    def table(self, name: str, file: str = "metadata.csv") -> list[dict[str, str]]:
        with (self.folder(name) / file).open(newline="") as lines:
            return list(csv.DictReader(lines))

    def domains(self, name: str, split: str) -> Counter[tuple[int, ...]]:
        """Domains of a split, and how many images each has there."""
        dataset = self.open(name)
        columns = [dataset.metadata_fields.index(field) for field in DOMAIN[name]]
        rows = dataset.metadata_array[dataset.split_array == dataset.split_dict[split]][:, columns]
        return Counter(tuple(row) for row in rows.long().tolist())

    def labels(self, name: str, split: str) -> Counter[int]:
        dataset = self.open(name)
        return Counter(dataset.y_array[dataset.split_array == dataset.split_dict[split]].long().flatten().tolist())

    def train(self, name: str, *, edge: int) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[Any]]:
        """Pictures of train ``[n, edge, edge, channels]`` made smaller, classes or wealth ``[n]``, domain numbers ``[n]``."""
        dataset = self.open(name)
        index = np.flatnonzero(dataset.split_array == dataset.split_dict["train"])
        columns = [dataset.metadata_fields.index(field) for field in DOMAIN[name]]
        keys = [tuple(row) for row in dataset.metadata_array[index][:, columns].long().tolist()]
        number = {key: i for i, key in enumerate(sorted(set(keys)))}
        small = [np.asarray(dataset.get_input(i).resize((edge, edge), Image.Resampling.BOX), np.float64) / 255 for i in index]
        return np.stack(small), dataset.y_array[index].numpy().ravel(), np.array([number[key] for key in keys])


def stock(name: str, root: Path, fold: str = "A") -> Any:
    """The package's own data set, with what it needs on today's libraries."""
    sys.modules["outdated"] = None  # type: ignore[assignment]  # asks the network at import
    from dmoe.models.torchvision_import import torchvision

    torchvision()
    pandas = pytest.importorskip("pandas")
    get_dataset = pytest.importorskip("wilds").get_dataset
    keywords = {"fold": fold} if name == "poverty" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pandas, "to_datetime", functools.partial(pandas.to_datetime, format="ISO8601"))
        return get_dataset(dataset=RELEASES[name].wilds_name, root_dir=str(root), download=False, **keywords)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("wilds"))


def command(*words: object, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run the script with these words; its exit status."""
    monkeypatch.setattr(sys, "argv", ["make_wilds_sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("iwildcam", {"train", "val", "test", "id_val", "id_test"}),
        ("camelyon", {"train", "val", "test", "id_val"}),
        ("rxrx1", {"train", "val", "test", "id_test"}),
        ("fmow", {"train", "val", "test", "id_val", "id_test"}),
        ("poverty", {"train", "val", "test", "id_val", "id_test"}),
    ],
)
def test_stock_wilds_opens_it_and_finds_images_in_every_split(samples: Samples, name: str, splits: set[str]) -> None:
    assert {split for split in samples.open(name).split_dict if samples.domains(name, split)} == splits
    assert set(samples.open(name).split_dict) == splits


@pytest.mark.parametrize(
    ("name", "train", "val", "test"),
    [("iwildcam", 12, 4, 4), ("camelyon", 9, 3, 3), ("rxrx1", 8, 3, 4), ("fmow", 36, 18, 12), ("poverty", 13, 5, 5)],
)
def test_train_val_and_test_have_so_many_domains_and_none_in_common(
    samples: Samples, name: str, train: int, val: int, test: int
) -> None:
    domains = {split: set(samples.domains(name, split)) for split in samples.open(name).split_dict}
    assert (len(domains["train"]), len(domains["val"]), len(domains["test"])) == (train, val, test)
    assert len(domains["train"] | domains["val"] | domains["test"]) == train + val + test
    assert all(domains[split] <= domains["train"] for split in ("id_val", "id_test") if split in domains)


@pytest.mark.parametrize("name", ["iwildcam", "camelyon", "rxrx1", "poverty"])
def test_the_numbers_of_the_train_domains_have_gaps(samples: Samples, name: str) -> None:
    numbers = sorted(number for (number,) in samples.domains(name, "train"))
    assert numbers != list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_years_and_regions_of_fmow_are_all_there(samples: Samples) -> None:
    metadata_map = samples.open("fmow").metadata_map
    years = {split: {year + 2002 for year, _ in samples.domains("fmow", split)} for split in ("train", "val", "test")}
    assert years == {"train": {2002, 2004, 2007, 2009, 2010, 2012}, "val": {2013, 2014, 2015}, "test": {2016, 2017}}
    for split in years:
        regions = {metadata_map["region"][region] for _, region in samples.domains("fmow", split)}
        assert regions == {"Asia", "Europe", "Africa", "Americas", "Oceania", "Other"}


def test_the_hospitals_of_camelyon_are_the_real_ones(samples: Samples) -> None:
    hospitals = {split: {slide // 10 for (slide,) in samples.domains("camelyon", split)} for split in ("train", "val", "test")}
    assert hospitals == {"train": {0, 3, 4}, "val": {1}, "test": {2}}
    dataset = samples.open("camelyon")
    columns = [dataset.metadata_fields.index(field) for field in ("hospital", "slide")]
    assert all(hospital == slide // 10 for hospital, slide in dataset.metadata_array[:, columns].tolist())


def test_the_cell_types_of_rxrx1_are_all_in_train_and_test(samples: Samples) -> None:
    names = samples.open("rxrx1").metadata_map["experiment"]
    for split in ("train", "test"):
        assert {names[e].split("-")[0] for (e,) in samples.domains("rxrx1", split)} == {"HEPG2", "HUVEC", "RPE", "U2OS"}


@pytest.mark.parametrize("name", ["camelyon", "rxrx1", "fmow"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_domain_has_the_images_asked_for(samples: Samples, name: str, split: str) -> None:
    assert set(samples.domains(name, split).values()) == {CONTENTS[name].images_per_domain}


def test_one_source_location_is_small_and_the_others_have_the_images_asked_for(samples: Samples) -> None:
    assert sorted(samples.domains("iwildcam", "train").values()) == [3] + [24] * 11
    assert set(samples.domains("iwildcam", "val").values()) == set(samples.domains("iwildcam", "test").values()) == {24}


@pytest.mark.parametrize("fold", "ABCDE")
def test_every_fold_of_poverty_keeps_images_of_every_train_country(samples: Samples, fold: str) -> None:
    dataset = samples.open("poverty", fold)
    sizes = {split: int((dataset.split_array == number).sum()) for split, number in dataset.split_dict.items()}
    assert sizes["id_val"] == sizes["id_test"] == 1000
    assert min(sizes["train"], sizes["val"], sizes["test"]) > 0
    countries = dataset.metadata_array[:, dataset.metadata_fields.index("country")]
    in_train = Counter(countries[dataset.split_array == 0].tolist())
    assert len(in_train) == (13 if fold == "A" else 14)
    assert min(in_train.values()) >= CONTENTS["poverty"].images_per_domain


def test_no_fewer_rows_a_country_would_do(samples: Samples) -> None:
    counts = Counter(row["country"] for row in samples.table("poverty", "dhs_metadata.csv"))
    assert set(counts.values()) == {rows_per_country(4)}
    assert rows_per_country(3) < rows_per_country(4) < rows_per_country(24)
    assert 13 * rows_per_country(4) < script.SET_ASIDE + 13 * 4 * 3


@pytest.mark.parametrize(
    ("name", "sizes", "kind"),
    [
        ("iwildcam", {(85, 64), (106, 64)}, "JPEG"),
        ("camelyon", {(96, 96)}, "PNG"),
        ("rxrx1", {(256, 256)}, "PNG"),
        ("fmow", {(224, 224)}, "PNG"),
    ],
)
def test_every_image_opens_with_its_size_and_mode(samples: Samples, name: str, sizes: set[tuple[int, int]], kind: str) -> None:
    dataset = samples.open(name)
    images = [dataset.get_input(i) for i in range(len(dataset))]
    assert {image.size for image in images} == sizes
    assert {image.mode for image in images} == {"RGB"}
    for path in [path for path in samples.folder(name).rglob("*") if path.suffix in (".jpg", ".png")]:
        with Image.open(path) as image:
            assert image.format == kind


def test_every_image_of_poverty_is_there_and_some_open(samples: Samples) -> None:
    dataset = samples.open("poverty")
    names = {f"landsat_poverty_img_{i}.npz" for i in range(len(dataset))}
    assert {path.name for path in (samples.folder("poverty") / "images").iterdir()} == names
    for i in range(0, len(dataset), 97):
        image = dataset.get_input(i)
        assert image.shape == (8, 224, 224)
        assert image.isfinite().all()
    assert max((samples.folder("poverty") / "images" / name).stat().st_size for name in names) < 15_000


@pytest.mark.parametrize(("name", "classes"), [("iwildcam", 6), ("camelyon", 2), ("rxrx1", 6), ("fmow", 8)])
def test_the_classes_of_train_occur_in_val_and_test(samples: Samples, name: str, classes: int) -> None:
    assert len(samples.labels(name, "train")) == classes
    assert set(samples.labels(name, "train")) == set(samples.labels(name, "val")) == set(samples.labels(name, "test"))


def test_wilds_counts_the_classes(samples: Samples) -> None:
    assert [int(samples.open(name).n_classes) for name in ("iwildcam", "camelyon", "rxrx1", "fmow")] == [6, 2, 6, 62]


def test_fmow_has_rows_that_wilds_leaves_out_among_the_others(samples: Samples) -> None:
    dataset, rows = samples.open("fmow"), samples.table("fmow", "rgb_metadata.csv")
    sequestered = [i for i, row in enumerate(rows) if row["split"] == "seq"]
    assert sequestered
    assert len(dataset) == len(rows) - len(sequestered)
    assert sequestered[0] < len(dataset)  # so the number of an image is not its place in the data set
    assert (dataset.split_array == -1).any()


def test_a_few_timestamps_of_fmow_have_fractions_of_seconds(samples: Samples) -> None:
    stamps = [row["timestamp"] for row in samples.table("fmow", "rgb_metadata.csv")]
    fractional = [stamp for stamp in stamps if "." in stamp]
    assert 3 <= len(fractional) < len(stamps) / 10
    assert all(len(stamp) == len("2015-03-02T08:10:11.123Z") for stamp in fractional)
    assert "." not in stamps[0]


def test_patients_of_camelyon_have_three_digits(samples: Samples) -> None:
    assert {len(row["patient"]) for row in samples.table("camelyon")} == {3}


def test_wealth_is_roughly_standard_normal(samples: Samples) -> None:
    wealth = samples.open("poverty").y_array
    assert abs(float(wealth.mean())) < 0.15
    assert 0.8 < float(wealth.std()) < 1.2


def features_of_shape(images: NDArray[np.float64], domains: NDArray[Any]) -> NDArray[np.float64]:
    """How far each pixel is from what its domain mostly shows there."""
    gray = images.mean(-1)
    usual = np.stack([np.median(gray[domains == domain], axis=0) for domain in range(domains.max() + 1)])
    return np.abs(gray - usual[domains]).reshape(len(images), -1)


def features_of_texture(images: NDArray[np.float64], domains: NDArray[Any]) -> NDArray[np.float64]:
    """Which spatial frequencies there are, wherever the cells lie and however they are turned."""
    gray = images.mean(-1) - images.mean((1, 2, 3))[:, None, None]
    spectrum = np.abs(np.fft.fft2(gray / gray.std((1, 2))[:, None, None])) ** 2
    frequency = np.fft.fftfreq(images.shape[1]) * images.shape[1]
    ring = np.hypot(frequency[:, None], frequency[None, :]).astype(int)
    return np.log(np.stack([spectrum[:, ring == radius].mean(1) for radius in range(1, images.shape[1] // 2)], 1))


Features = Callable[[NDArray[np.float64], NDArray[Any]], NDArray[np.float64]]


def within_domains(classifier: Any, features: NDArray[np.float64], answers: NDArray[Any]) -> float:
    """Accuracy on held-out images of the very domains that were learned from."""
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    return float(cross_val_score(make_pipeline(StandardScaler(), classifier), features, answers, cv=folds).mean())


@pytest.mark.parametrize(
    ("name", "edge", "features", "least"),
    [
        ("iwildcam", 16, features_of_shape, 0.4),
        ("camelyon", 32, features_of_texture, 0.85),
        ("rxrx1", 128, features_of_texture, 0.45),
        ("fmow", 32, features_of_texture, 0.6),
    ],
)
def test_the_class_is_visible(samples: Samples, name: str, edge: int, features: Features, least: float) -> None:
    images, labels, domains = samples.train(name, edge=edge)
    assert least > 1.6 * np.bincount(labels).max() / len(labels)  # of the commonest class
    assert within_domains(LogisticRegression(C=0.1, max_iter=200), features(images, domains), labels) > least


@pytest.mark.parametrize(("name", "least"), [("iwildcam", 0.5), ("camelyon", 0.3), ("rxrx1", 0.5), ("fmow", 0.5)])
def test_the_domain_is_visible_in_the_colours(samples: Samples, name: str, least: float) -> None:
    images, _, domains = samples.train(name, edge=16)
    enough = np.bincount(domains)[domains] > 3
    colours = np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)
    assert least > 2.5 / (domains.max() + 1)
    assert within_domains(NearestCentroid(), colours[enough], domains[enough]) > least


def test_every_hospital_has_its_stain(samples: Samples) -> None:
    dataset = samples.open("camelyon")
    hospitals = dataset.metadata_array[:, dataset.metadata_fields.index("hospital")].numpy()
    colours = np.stack([np.asarray(dataset.get_input(i)).mean((0, 1)) for i in range(len(dataset))])
    assert within_domains(NearestCentroid(), colours, hospitals) > 0.8


def test_wealth_and_country_are_visible(samples: Samples) -> None:
    dataset = samples.open("poverty")
    countries = dataset.metadata_array[:, dataset.metadata_fields.index("country")].numpy()
    chosen = [np.flatnonzero(countries == country)[:16] for country in range(23)]
    levels = [np.stack([dataset.get_input(i).mean((1, 2)).numpy() for i in index]) for index in chosen]
    wealth = dataset.y_array.numpy().ravel()
    within = [np.corrcoef(level[:, -1], wealth[index])[0, 1] for level, index in zip(levels, chosen, strict=True)]
    assert min(within) > 0.8
    features, names = np.concatenate(levels), np.repeat(np.arange(23), 16)
    assert within_domains(NearestCentroid(), features, names) > 0.4


@pytest.mark.parametrize("name", ["iwildcam", "camelyon"])
def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path, name: str) -> None:
    made = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        RELEASES[name].make(tmp_path / folder, FEW._replace(seed=seed))
        made.append(contents(RELEASES[name].folder(tmp_path / folder)))
    first, again, other = made
    assert first == again
    assert set(first.values()).isdisjoint(set(other.values()) - {first.get("categories.csv")})


def test_the_command_says_one_line_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (tmp_path, "--datasets", "camelyon", "iwildcam", "--images_per_domain", 4, "--size", 32, "--classes", 3)
    assert command(*words, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["camelyon", "iwildcam"]
    assert all(" images, " in line and " MB, " in line and line.endswith(" s") for line in said)
    assert {path.name for path in tmp_path.iterdir()} == {"camelyon17_v1.0", "iwildcam_v2.0"}
    assert int(stock("iwildcam", tmp_path).n_classes) == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--datasets", "imagenet"), "'imagenet'"),
        (("--images_per_domain", "3"), "--images_per_domain"),
        (("--classes", "13"), "--classes"),
        (("--size", "8"), "--size"),
        (("--no_such_flag",), "--no_such_flag"),
    ],
)
def test_wrong_words_end_in_one_line_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    assert command(tmp_path, *words, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert named in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_sample_is_replaced_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = (tmp_path, "--datasets", "camelyon", "--images_per_domain", 4), tmp_path / "camelyon17_v1.0"
    assert command(*words, monkeypatch=monkeypatch) == 0
    before = contents(folder)
    assert command(*words, "--seed", 1, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {folder}: exists: --overwrite replaces it\n"
    assert contents(folder) == before
    assert command(*words, "--seed", 1, "--overwrite", monkeypatch=monkeypatch) == 0
    assert set(contents(folder).values()).isdisjoint(before.values())
    assert [path.name for path in tmp_path.iterdir()] == ["camelyon17_v1.0"]


@pytest.mark.parametrize("release_note", [None, "RELEASE_v1.0.txt"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_folder_of_another_origin_is_never_touched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    release_note: str | None,
    flags: tuple[str, ...],
) -> None:
    folder = tmp_path / "camelyon17_v1.0"
    folder.mkdir()
    (folder / "metadata.csv").write_text("real")
    if release_note:
        (folder / release_note).write_text("Camelyon17-WILDS 1.0")
    before = contents(tmp_path)
    assert command(tmp_path, "--datasets", "iwildcam", "camelyon", *flags, monkeypatch=monkeypatch) == 2
    assert f"error: {folder}: exists, and is not a sample" in capsys.readouterr().err
    assert contents(tmp_path) == before  # iwildcam, named first, was not begun either


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: BaseException
) -> None:
    RELEASES["camelyon"].make(tmp_path, FEW)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(script, "write_table", fail)
    words = (tmp_path, "--overwrite", "--images_per_domain", 4, "--datasets", "camelyon")
    assert command(*words, monkeypatch=monkeypatch) == (130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["camelyon17_v1.0"]
