"""Bad input in processes of their own: status 2, one line on stderr; and memory that does not grow with what is broken."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doors import OPTIONS, ROOT, Made, changes, make_pictures, state
from test_bad_images import BROKEN

BROKEN_IMAGES = 3000
MEGABYTES = 300
"""That may be added: Pillow's formats alone are a few dozen, and a picture of some megapixels is whole in memory for a moment."""


def ended(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "weights cut off": ("meta/weights.safetensors", _cut, ["--test"]),
    "manifest deep": ("student/manifest.json", lambda path: path.write_text("[" * 100_000), []),
    "configuration a pipe": ("config.yaml", lambda path: (path.unlink(), os.mkfifo(path)), ["--test"]),
    "configuration of jokes": ("config.yaml", lambda path: path.write_text('"a\\n\\e[31m": 1\n'), ["--test"]),
    "description a list": (
        "model.json",
        lambda path: path.write_text('{"transform": [], "task": [], "class_names": 3}'),
        ["--test"],
    ),
    "partition of text": ("experts/partition.json", lambda path: path.write_text('{"experts": "both"}'), []),
    "results a folder": ("results.jsonl", lambda path: (path.unlink(), path.mkdir()), ["--test"]),
}


@pytest.mark.parametrize("how", list(DAMAGES))
def test_a_process_ends_in_one_line_and_status_2(how: str, whole: Path, made: Made) -> None:
    name, damage, flags = DAMAGES[how]
    damage(whole / name)
    before = state(whole, made.pictures)
    found = ended("run.py", "--run_dir", whole, "--gpu", "-1", "--threads", "1", *(flags or ["--load_trained_experts"]))
    assert found.returncode == 2, found
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and found.stderr[:-1].isprintable(), found.stderr
    assert name.rpartition("/")[2] in found.stderr
    assert changes(before, state(whole, made.pictures)) == set()


def test_a_name_that_no_folder_can_have_is_told(tmp_path: Path) -> None:
    found = ended("run.py", "--run_dir", tmp_path / ("x" * 300), "--gpu", "-1")
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert "too long" in found.stderr


def test_program_in_published_weights_does_not_run_in_a_process(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Program:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {canary}",)

    for number in range(2):
        torch.save({"fc.weight": Program()}, tmp_path / f"folders_2experts_seed1_{number}_exp_best.pth")
    make_pictures(tmp_path / "pictures")
    config = ["--config", ROOT / "configs" / "small_pictures.yaml", "--data_dir", tmp_path / "pictures", *OPTIONS]
    config += ["aggregator.output_map=false", "experts.backbone.name=resnet18", "data.image_size=32", "data.channels=3"]
    flags = ["--run_dir", tmp_path / "run", "--gpu", "-1", "--test", "--checkpoint_dir", tmp_path]
    found = ended("run.py", *config, *flags)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    assert "exp_best.pth: not a whole file of plain tensors" in found.stderr
    assert not canary.exists() and not (tmp_path / "run").exists()


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from dmoe.config import DataConfig
from dmoe.data.files import read_pixels
from dmoe.data.registry import Opening, load_dataset

def peak():
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024

few, many = (
    DataConfig(dir=folder, target_domains=("sketch",), image_size=8, decoded_gb=0, skip_unreadable=True)
    for folder in sys.argv[1:3]
)
load_dataset("folders", few, Opening(writes=False))
before = peak()
found = load_dataset("folders", many, Opening(workers=int(sys.argv[3]), writes=False))
print(json.dumps({"megabytes": peak() - before, "left out": len(found.unreadable)}))
"""


@pytest.fixture(scope="module")
def heaps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures, and one in which thousands are broken, in every way."""
    parent = tmp_path_factory.mktemp("heaps")
    few, many = parent / "few", parent / "many"
    for folder in (few, many):
        make_pictures(folder)
    contents = [content for content in BROKEN.values() if len(content) < 1 << 17]
    for number in range(BROKEN_IMAGES):
        (many / "photo" / "cat" / f"broken_{number}.png").write_bytes(contents[number % len(contents)])
    return few, many


@pytest.mark.parametrize("workers", [0, 2])
def test_thousands_of_broken_images_take_no_more_memory_than_one(workers: int, heaps: tuple[Path, Path]) -> None:
    found = ended("-c", MEASURE, *heaps, workers)
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout)
    print(measured)
    assert measured["left out"] == BROKEN_IMAGES
    assert measured["megabytes"] < MEGABYTES
    assert found.stderr == ""


def test_a_run_says_how_many_are_broken_and_not_which(heaps: tuple[Path, Path], tmp_path: Path) -> None:
    many = heaps[1]
    config = ["--config", ROOT / "configs" / "small_pictures.yaml", "--data_dir", many, *OPTIONS, "data.skip_unreadable=true"]
    found = ended("run.py", *config, "--run_dir", tmp_path / "run", "--gpu", "-1", "--threads", "1", "--dry_run")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout) < 3000 and "broken_" not in found.stdout + found.stderr
    assert "images" in found.stdout
