"""A finished run becomes the public code's files, and what is no such run is told in one line."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmoe.artifacts import save_tensors, with_prefix, write_json
from dmoe.config import CONFIG_FOLDER, Config, load_config
from dmoe.data.partition import write_partition
from dmoe.errors import UserError
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network, build_network
from dmoe.published import PublishedFolder
from dmoe.run_folder import RunFolder
from scripts.export_published import command_to_test, export

ROOT = Path(__file__).resolve().parent.parent.parent
GROUPS = {3: 0, 5: 1, 8: 0}
NAME = "digits_2experts_seed6"
SETTINGS = ["experts.count=2", "experts.backbone.name=resnet18", "aggregator.heads=16", "aggregator.output_map=false", "seed=6"]


def config(*overrides: str) -> Config:
    return load_config(CONFIG_FOLDER / "digits.yaml", [*SETTINGS, *overrides])


def network() -> Network:
    return build_network("resnet18", image_shape=(3, 32, 32), num_outputs=4)


def save(run: RunFolder, stage: str, **modules: nn.Module) -> None:
    tensors = {name: tensor for part, module in modules.items() for name, tensor in with_prefix(part, module.state_dict()).items()}
    save_tensors(run.stage(stage, {}).weights, tensors)


Parts = dict[str, Network | Aggregator]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts]:
    """The folder of a run as its stages leave it, and the networks that are in it."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "a run")
    run.claim(config())
    parts: Parts = {name: network() for name in ("expert 0", "expert 1", "student", "pretrained student")}
    for name in ("aggregator", "pretrained aggregator"):
        parts[name] = Aggregator(width=512, num_outputs=4, depth=1, heads=16, dropout=0.1)
    for number in range(2):
        save(run, f"experts/expert_{number:02d}", model=parts[f"expert {number}"])
    save(run, "student", model=parts["pretrained student"])
    save(run, "aggregator", model=parts["pretrained aggregator"])
    save(run, "meta", student=parts["student"], aggregator=parts["aggregator"])
    write_partition(run.path / "experts" / "partition.json", GROUPS, {3: "three", 5: "five"})
    facts = {
        "transform": {"image_shape": [3, 32, 32]},
        "task": {"kind": "multiclass", "num_outputs": 4},
        "class_names": list("abcd"),
    }
    write_json(run.path / "model.json", facts)
    return run.path, parts


@pytest.fixture
def run(finished: tuple[Path, Parts], tmp_path: Path) -> RunFolder:
    """A copy of the run; weights are links, to be replaced but not written into."""
    return RunFolder(Path(shutil.copytree(finished[0], tmp_path / "run", copy_function=_link)))


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy(source, target)


def script(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "export_published.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_network_of_the_run_is_in_its_file(finished: tuple[Path, Parts], tmp_path: Path) -> None:
    folder, parts = finished
    done = script(folder, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    files = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert len(files) == 2 + 4 + 1
    published = PublishedFolder(tmp_path / "out", dataset="digits", experts=2, seed=6)
    written = {
        "expert 0": published.expert(0),
        "expert 1": published.expert(1),
        "student": published.student("meta"),
        "aggregator": published.aggregator("meta"),
        "pretrained student": published.student("pretrained"),
        "pretrained aggregator": published.aggregator("pretrained"),
    }
    for name, part in parts.items():
        own = part.state_dict()
        assert list(written[name]) == list(own), name
        assert all(torch.equal(tensor, own[key]) for key, tensor in written[name].items()), name
    assert published.partition() == GROUPS
    assert done.stdout.splitlines()[-1].endswith(command_to_test(RunFolder(folder), config(), tmp_path / "out"))


def test_command_names_the_data_set_where_the_run_is_as_its_shipped_configuration(tmp_path: Path) -> None:
    shipped = load_config(CONFIG_FOLDER / "digits.yaml")
    command = command_to_test(RunFolder(tmp_path), shipped, Path("the out"))
    assert command == "python run.py --dataset digits --test --checkpoint_dir 'the out'"


def test_command_names_the_runs_own_configuration_where_it_differs(run: RunFolder) -> None:
    words = shlex.split(command_to_test(run, run.config(), Path("out")))
    assert words[:3] == ["python", "run.py", "--config"]
    assert load_config(Path(words[3])) == run.config()


def told(run: RunFolder, out: Path) -> str:
    """The one line that an export ends with."""
    with pytest.raises(UserError) as caught:
        export(run, run.config(), out)
    assert "\n" not in str(caught.value)
    assert not out.exists() or not any(out.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    "missing",
    [
        "experts/expert_01/weights.safetensors",
        "student/weights.safetensors",
        "aggregator/weights.safetensors",
        "meta/weights.safetensors",
        "experts/partition.json",
    ],
)
def test_a_missing_file_is_named(run: RunFolder, tmp_path: Path, missing: str) -> None:
    (run.path / missing).unlink()
    assert told(run, tmp_path / "out").startswith(f"{run.path / missing}: ")


def test_a_run_that_is_not_finished_is_told(run: RunFolder, tmp_path: Path) -> None:
    (run.path / "model.json").unlink()
    assert told(run, tmp_path / "out").startswith(f"{run.path}: the run is not finished (no model.json)")


def _cut_off(path: Path) -> None:
    path.write_text(path.read_text()[:-10])


def _without_facts(path: Path) -> None:
    write_json(path, {"task": {}, "transform": {"image_shape": [3, 32]}})


def _third_expert(path: Path) -> None:
    write_json(path, {"experts": [[1], [2], [3]], "names": {}})


def _not_numbers(path: Path) -> None:
    write_json(path, {"experts": [["1"], ["2"]], "names": {}})


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.json", _cut_off),
        ("model.json", _without_facts),
        ("experts/partition.json", _cut_off),
        ("experts/partition.json", _third_expert),
        ("experts/partition.json", _not_numbers),
    ],
)
def test_a_damaged_record_is_named(run: RunFolder, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(run.path / file)
    assert told(run, tmp_path / "out").startswith(f"{run.path / file}: ")


def test_damaged_weights_are_named(run: RunFolder, tmp_path: Path) -> None:
    weights = run.path / "experts" / "expert_00" / "weights.safetensors"
    weights.unlink()
    weights.write_bytes(b"nothing")
    assert told(run, tmp_path / "out").startswith(f"{weights}: not a whole safetensors file")


@pytest.mark.parametrize(
    ("line", "instead", "expected"),
    [
        ("target: aggregator", "target: zeros", "meta.target=zeros"),
        ("name: resnet18", "name: resnet50", "it was made for another network"),
        ("depth: 1", "depth: 2", "it was made for another network"),
    ],
)
def test_a_run_that_does_not_fit_the_format_or_itself_is_told(
    run: RunFolder, tmp_path: Path, line: str, instead: str, expected: str
) -> None:
    path = run.path / "config.yaml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, instead))
    assert expected in told(run, tmp_path / "out")


def test_heads_that_the_format_cannot_tell_are_refused(run: RunFolder, tmp_path: Path) -> None:
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("heads: 16", "heads: 8"))
    assert "the aggregator has 8 heads" in told(run, tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    kept = tmp_path / "out" / f"{NAME}_0_exp_best.pth"
    kept.parent.mkdir()
    kept.write_text("theirs")
    for out in (kept.parent, kept):
        with pytest.raises(UserError, match="already holds something"):
            export(run, run.config(), out)
    assert kept.read_text() == "theirs"
    assert len(list(kept.parent.iterdir())) == 1


@pytest.mark.parametrize("arguments", [("nowhere", "out"), ("nowhere",), (), ("a", "b", "c"), ("--other", "a", "b")])
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = script(*(tmp_path / word if word.isalpha() else word for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
