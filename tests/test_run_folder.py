"""A run folder belongs to one configuration; a stage is finished, from which inputs, and its files are whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from told import names, one_line

from dmoe.artifacts import save_tensors
from dmoe.config import CONFIG_FOLDER, Config, load_config
from dmoe.errors import UserError
from dmoe.run_folder import RunFolder, Stage

ROOT = Path(__file__).resolve().parent.parent


def digits(*overrides: str) -> Config:
    return load_config(CONFIG_FOLDER / "digits.yaml", overrides)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.claim(digits())
    return folder


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A finished stage."""
    stage = Stage(tmp_path / "student", {"seed": 1, "meta": {"lr": 0.1}})
    save_tensors(stage.weights, {"a": torch.arange(10)})
    stage.finish(files=[stage.weights], figures={"steps": 3})
    return stage


def test_claimed_folder_records_the_configuration(tmp_path: Path) -> None:
    config = digits("meta.inner_lr=0.25", "student.backbone.name=resnet18")
    RunFolder(tmp_path / "a" / "b").claim(config)
    assert RunFolder(tmp_path / "a" / "b").config() == config


def test_empty_folder_can_be_claimed(tmp_path: Path) -> None:
    RunFolder(tmp_path).claim(digits())
    assert names(tmp_path) == ["config.yaml"]


def test_same_configuration_goes_on_in_its_folder(folder: RunFolder) -> None:
    before = (folder.path / "config.yaml").stat().st_mtime_ns
    folder.claim(digits())
    assert (folder.path / "config.yaml").stat().st_mtime_ns == before


def test_folder_that_is_being_claimed_by_another_process_is_not_foreign(tmp_path: Path) -> None:
    # Experts' processes that start together see each other's unfinished file.
    (tmp_path / ".config.yaml.12345.part").write_text("seed: 1\n")
    RunFolder(tmp_path).claim(digits())
    assert RunFolder(tmp_path).config() == digits()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).claim(digits())
    assert one_line(caught).startswith(f"{tmp_path}: not a run folder")
    assert names(tmp_path) == ["thesis.txt"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "file").claim(digits())
    assert one_line(caught).startswith(f"{tmp_path / 'file'}: not a run folder")


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "file" / "run").claim(digits())
    assert "cannot be written" in one_line(caught)


def test_other_configuration_is_refused_with_the_field_that_differs(folder: RunFolder) -> None:
    before = (folder.path / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        folder.claim(digits("meta.inner_lr=0.2"))
    assert one_line(caught).startswith(f"{folder.path}: made by another configuration, meta.inner_lr: 1.0 there, 0.2 here: ")
    assert (folder.path / "config.yaml").read_bytes() == before


def test_other_fields_that_differ_are_counted(folder: RunFolder) -> None:
    with pytest.raises(UserError, match=r"experts\.count: 6 there, 4 here \(and 2 more\)"):
        folder.claim(digits("experts.count=4", "seed=2", "meta.inner_lr=0.2"))


@pytest.mark.parametrize(
    "override",
    ["seed=2", "data.seed=1", "tokens.batch_size=100", "meta.target=zeros", "experts.training.batch_size=8"],
)
def test_what_decides_trained_weights_may_not_change(folder: RunFolder, override: str) -> None:
    with pytest.raises(UserError, match="another configuration"):
        folder.claim(digits(override))


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.support_size=8",
        "evaluation.score_support=false",
        "data.dir=/x",
        "data.workers=3",
        "data.decoded_gb=1",
        "data.decoded_dir=elsewhere",
        "experts.threads=2",
        "experts.retries=5",
        "experts.slurm_options=[--partition=gpu]",
        "checkpoint_every=9",
    ],
)
def test_how_it_is_tested_and_how_fast_it_goes_may_change(folder: RunFolder, override: str) -> None:
    folder.claim(digits(override))


def test_fresh_claim_refuses_a_folder_that_holds_a_run(folder: RunFolder) -> None:
    with pytest.raises(UserError) as caught:
        folder.claim(digits(), fresh=True)
    assert one_line(caught).startswith(f"{folder.path}: already holds a run")


def test_configuration_of_what_is_no_run_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "none").config()
    assert one_line(caught).startswith(f"{tmp_path / 'none'}: not a run folder")


@pytest.mark.parametrize("content", [b"seed: [1,\n", b"\xff\xfe", b"", b"seed: -1\n"])
def test_damaged_recorded_configuration_is_told_with_its_path(folder: RunFolder, content: bytes) -> None:
    path = folder.path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        folder.config()
    assert one_line(caught).startswith(f"{path}: ")


def test_stage_without_manifest_is_not_finished(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "student", {"seed": 1})
    save_tensors(stage.weights, {"a": torch.arange(10)})
    assert stage.finished() is None


def test_finished_stage_gives_its_manifest(stage: Stage) -> None:
    manifest = stage.finished()
    assert manifest is not None
    assert (manifest["stage"], manifest["figures"]) == ("student", {"steps": 3})
    assert {"python", "torch"} <= manifest["versions"].keys()


def test_stage_finished_from_other_inputs_is_refused_with_the_field_that_differs(stage: Stage) -> None:
    with pytest.raises(UserError) as caught:
        Stage(stage.folder, {"seed": 1, "meta": {"lr": 0.2}}).finished()
    message = one_line(caught)
    assert message.startswith(f"{stage.manifest}: made from other inputs, meta.lr: 0.1 there, 0.2 here: ")
    assert f"delete {stage.folder}" in message


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"!"])
def test_changed_or_cut_off_file_of_a_finished_stage_is_told(stage: Stage, damage: object) -> None:
    stage.weights.write_bytes(damage(stage.weights.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        stage.finished()
    assert one_line(caught).startswith(f"{stage.weights}: changed or cut off")


def test_missing_file_of_a_finished_stage_is_told(stage: Stage) -> None:
    stage.weights.unlink()
    with pytest.raises(UserError) as caught:
        stage.finished()
    assert one_line(caught).startswith(f"{stage.weights}: missing")


def test_damaged_manifest_is_told(stage: Stage) -> None:
    stage.manifest.write_text("{")
    with pytest.raises(UserError) as caught:
        stage.finished()
    assert one_line(caught).startswith(f"{stage.manifest}: damaged")


def test_key_depends_on_the_inputs_and_not_on_their_order(tmp_path: Path) -> None:
    keys = [Stage(tmp_path, inputs).key for inputs in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3})]
    assert keys[0] == keys[1] != keys[2]


def test_results_are_appended_a_line_each(folder: RunFolder) -> None:
    folder.append_result({"method": "adapted", "mean": 0.5})
    folder.append_result({"method": "plain", "mean": 0.4})
    rows = [json.loads(line) for line in folder.results.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["adapted", "plain"]


def test_very_same_result_is_not_appended_twice(folder: RunFolder) -> None:
    for mean in (0.5, 0.4, 0.5):
        folder.append_result({"method": "adapted", "mean": mean})
    assert len(folder.results.read_text().splitlines()) == 2


def test_second_process_waits_until_the_first_has_left_a_stage(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "student", {})
    code = (
        "import sys; from pathlib import Path; from dmoe.run_folder import Stage\n"
        "with Stage(Path(sys.argv[1]), {}).alone(): print('in', flush=True)"
    )
    with stage.alone():
        other = subprocess.Popen([sys.executable, "-c", code, str(stage.folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert other.stdout is not None
        assert "waiting" in other.stdout.readline()
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "in\n"
    assert other.returncode == 0


def test_stage_whose_folder_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), Stage(tmp_path / "file" / "student", {}).alone():
        pass


def row(method: str, score: float, split: str = "target") -> str:
    return json.dumps({"method": method, "split": split, "mean": score}) + "\n"


def test_the_last_result_of_a_method_on_a_split_counts(folder: RunFolder) -> None:
    folder.results.write_text(row("adapted", 0.1) + row("plain", 0.4) + row("adapted", 0.2) + row("adapted", 0.9, "validation"))
    found = folder.last_results("target")
    assert [(method, one["mean"]) for method, one in found.items()] == [("adapted", 0.2), ("plain", 0.4)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"split": "target"}', "3", "[" * 100_000, '{"split": "target", "method": []}'])
def test_a_damaged_result_is_told_with_its_line(folder: RunFolder, damage: str) -> None:
    folder.results.write_text(row("adapted", 0.1) + damage)
    with pytest.raises(UserError) as caught:
        folder.last_results("target")
    assert one_line(caught).startswith(f"{folder.results}: line 2: damaged")


@pytest.mark.parametrize("content", [None, "", row("adapted", 0.1, "validation")])
def test_a_folder_without_results_of_the_split_is_told(folder: RunFolder, content: str | None) -> None:
    if content is not None:
        folder.results.write_text(content)
    with pytest.raises(UserError) as caught:
        folder.last_results("target")
    assert str(folder.results) in one_line(caught) and "run.py --test" in one_line(caught)
