"""The sample tree of pictures: what it holds, that it opens, and that it never overwrites."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe.data import digits, folders
from dmoe.errors import UserError
from scripts.make_folder_sample import MOST_PER_CLASS, SCANNERS, folder_name, main, picture, write_sample
from tests.told import names, one_line

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "make_folder_sample.py"
TARGETS = ["045_degrees", "225_degrees"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "pictures"
    assert write_sample(out, images_per_class=3) == 300
    return out


def test_ten_domains_hold_ten_classes_of_so_many_small_grey_pictures(sample: Path) -> None:
    assert sorted(names(sample)) == sorted(folder_name(s) for scanners in SCANNERS.values() for s in scanners)
    for domain in sample.iterdir():
        assert {path.name: len(names(path)) for path in domain.iterdir()} == {str(c): 3 for c in range(10)}
    for path in sample.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (14, 14))


def test_no_target_scanner_stands_where_a_source_scanner_does() -> None:
    assert {s.angle for s in SCANNERS["target"]}.isdisjoint(s.angle for s in SCANNERS["source"])
    assert [folder_name(s) for s in SCANNERS["target"]] == TARGETS


def test_pictures_are_what_the_scanners_of_their_split_see(sample: Path) -> None:
    dataset = digits.load()
    for split, angle in (("source", 60), ("target", 45)):
        scans = dataset.splits[split]
        first = scans.members[2 * angle][scans.labels[scans.members[2 * angle]] == 7][0]
        expected = scans.images(first[None])[0, 0].clamp(0, 1)
        path = min((sample / f"{angle:03d}_degrees" / "7").iterdir())
        assert np.abs(np.asarray(Image.open(path)) / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-6


def test_black_and_white_are_the_ends_of_the_scale() -> None:
    image = torch.tensor([[[-0.7, 0.0, 0.5], [1.0, 1.9, 0.2]]])
    assert np.asarray(picture(image)).tolist() == [[0, 0, 128], [255, 255, 51]]


def test_the_tree_opens_as_a_data_set(sample: Path) -> None:
    dataset = folders.load(
        sample,
        target_domains=TARGETS,
        validation_domains=[],
        validation_fraction=0.2,
        labels="classes",
        image_size=14,
        channels=1,
        augmentation="none",
        seed=0,
        skip_unreadable=False,
        known_unreadable=None,
        workers=0,
    )
    assert {name: len(split) for name, split in dataset.splits.items()} == {"source": 192, "validation": 48, "target": 60}
    assert dataset.class_names == [str(c) for c in range(10)]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already_is_never_touched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    mine = out / "mine.txt" if kind == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError) as caught:
        write_sample(out, images_per_class=1)
    assert one_line(caught).startswith(f"{out}: is there already")
    assert mine.read_text() == "mine"
    assert names(mine.parent) == [mine.name]


def test_the_script_writes_into_an_empty_folder_and_says_what_to_do_next(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--images_per_class", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 pictures of 10 domains and 10 classes" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "python run.py --dataset folders --config configs/small_pictures.yaml --run_dir runs/small_pictures "
        f"--data_dir {tmp_path} 'data.target_domains=[045_degrees,225_degrees]'"
    )
    again = run(str(tmp_path))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1
    assert str(tmp_path) in again.stderr


@pytest.mark.parametrize("count", [0, MOST_PER_CLASS + 1])
def test_a_number_of_images_that_cannot_be_is_refused(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), "--images_per_class", str(count)])
    with pytest.raises(UserError) as caught:
        main()
    assert one_line(caught) == f"--images_per_class: must be from 1 to {MOST_PER_CLASS}, got {count}"
    assert not (tmp_path / "out").exists()
