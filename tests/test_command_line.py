"""The entry points as a user meets them: help at once, and every wrong input in one line with status 2."""

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import torch

from dmoe.artifacts import save_tensors, with_prefix
from dmoe.command_line import open_run, parser, run_main
from dmoe.errors import UserError
from dmoe.model import build_aggregator, describe

ROOT = Path(__file__).resolve().parent.parent
ONE_STEP = [
    "data.source_images_per_domain=80",
    "experts.training.duration=1 step",
    "aggregator.training.duration=1 step",
    "student.training.duration=1 step",
    "meta.duration=1 step",
]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def call(script: str, *arguments: object, python: tuple[str, ...] = (), timeout: float = 60) -> Ended:
    """A script as its own process; it and all its children are gone when this returns."""
    command = [sys.executable, *python, script, *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Ended(process.returncode, out, err)


def refusal(ended: Ended) -> str:
    """The one line with which wrong input ends."""
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    return ended.err.removeprefix("error: ").rstrip("\n")


class Refused(Protocol):
    """The line with which a script refuses its arguments."""

    def __call__(self, script: str, *arguments: object) -> str: ...


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A script's refusal without the time that a process of its own takes to start."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, "--threads", "1", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(importlib.import_module(script.removesuffix(".py")).main)
        said = capsys.readouterr()
        return refusal(Ended(int(str(ended.value)), said.out, said.err))

    return run


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose stages are all finished, by networks that have learned nothing."""
    folder = tmp_path_factory.mktemp("command_line") / "run"
    options = parser("", epilog="").parse_intermixed_args(["--run_dir", str(folder), "--gpu", "-1", "--threads", "1"])
    run = open_run(options)
    experts, student = [], run.network(run.config.student_backbone, "student", to_train=False)
    for number in range(run.config.experts.count):
        stage = run.expert_stage(number)
        experts.append(run.network(run.config.experts.backbone, "expert", number, to_train=False))
        save_tensors(stage.weights, with_prefix("model", experts[-1].state_dict()))
        stage.finish(files=[stage.weights], figures={})
    save_tensors(run.student_stage.weights, with_prefix("model", student.state_dict()))
    run.student_stage.finish(files=[run.student_stage.weights], figures={})
    aggregator = build_aggregator(run.config.aggregator, width=student.width, num_outputs=10)
    meta = run.folder.stage("meta", run.facts("meta"))
    weights = {**with_prefix("student", student.state_dict()), **with_prefix("aggregator", aggregator.state_dict())}
    save_tensors(meta.weights, weights)
    meta.finish(files=[meta.weights], figures={})
    describe(run.folder, run.dataset)
    return folder


@pytest.fixture
def damaged(finished: Path) -> Iterator[Path]:
    """The finished run, to damage; it is whole again afterwards."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    yield finished
    for path, content in before.items():
        path.write_bytes(content)


@pytest.mark.parametrize("script", ["run.py", "train_single_expert.py"])
def test_help_explains_at_once_and_without_torch(script: str) -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ended = call(script, "-h")
        seconds.append(time.perf_counter() - began)
        assert ended.status == 0
        assert "--run_dir" in ended.out and "key.sub=value" in ended.out and "example" in ended.out
    assert min(seconds) < 1.0
    imported = {line.rsplit("|", 1)[-1].strip() for line in call(script, "-h", python=("-X", "importtime")).err.splitlines()}
    assert "dmoe.command_line" in imported
    assert not {"torch", "numpy", "pydantic"} & imported


@pytest.mark.parametrize("script", ["run.py", "train_single_expert.py"])
def test_published_flags_are_there(script: str) -> None:
    text = call(script, "-h").out
    published = ["--dataset", "--data_dir", "--gpu", "--threads"]
    more = ["--load_trained_experts", "--load_pretrained_aggregator", "--load_pretrained_student", "--test"]
    for flag in published + (more if script == "run.py" else ["--expert_idx"]):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "mnist"], "--dataset: 'mnist' is unknown"),
        (["meta.inner_rate=1"], "command line: meta.inner_rate is not a field"),
        (["experts.count=30"], "experts.count: 30 experts"),
    ],
)
def test_process_with_wrong_input_ends_with_one_line_and_status_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert refusal(call("run.py", "--run_dir", tmp_path / "run", *arguments)).startswith(said)


@pytest.mark.parametrize("argument", ["--nonsense", "--gpu=first", "--threads=many"])
def test_unknown_or_malformed_flag_is_told(refused: Refused, argument: str) -> None:
    message = refused("run.py", argument)
    assert message.startswith("command line: ")
    assert argument.split("=", maxsplit=1)[0] in message


def test_expert_without_a_number_is_told(refused: Refused) -> None:
    assert "--expert_idx" in refused("train_single_expert.py")


def test_unknown_dataset_is_told_with_the_known_ones(refused: Refused, tmp_path: Path) -> None:
    message = refused("run.py", "--dataset", "mnist", "--run_dir", tmp_path / "run")
    assert message.startswith("--dataset: 'mnist' is unknown; known: ")
    assert "digits" in message
    assert not (tmp_path / "run").exists()


def test_unknown_dataset_of_a_configuration_is_told(refused: Refused, tmp_path: Path) -> None:
    message = refused("run.py", "--run_dir", tmp_path / "run", "dataset=mnist")
    assert "'mnist' is unknown; known: digits" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("meta.inner_rate=1", "command line: meta.inner_rate is not a field; known here: "),
        ("meta.inner_lr=-1", "command line: meta.inner_lr must be > 0.0, got -1"),
        ("seed=one", "command line: seed must be a whole number, got 'one'"),
        ("meta.inner_lr", "command line: overrides look like meta.inner_lr=0.2, got 'meta.inner_lr'"),
    ],
)
def test_wrong_field_or_value_is_told(refused: Refused, tmp_path: Path, override: str, said: str) -> None:
    assert refused("run.py", "--run_dir", tmp_path / "run", override).startswith(said)
    assert not (tmp_path / "run").exists()


def test_missing_configuration_file_is_told(refused: Refused, tmp_path: Path) -> None:
    assert refused("run.py", "--config", tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: no such configuration")


def test_folder_that_is_no_run_folder_is_told_and_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    assert refused("run.py", "--run_dir", tmp_path).startswith(f"{tmp_path}: not a run folder")
    assert contents(tmp_path) == before


def test_testing_what_is_no_run_is_told(refused: Refused, tmp_path: Path) -> None:
    assert refused("run.py", "--test", "--run_dir", tmp_path / "none").startswith(f"{tmp_path / 'none'}: not a run folder")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script", [("run.py",), ("train_single_expert.py", "--expert_idx", "0", "--dataset", "digits")])
def test_run_folder_of_another_configuration_is_told_and_left_alone(
    refused: Refused, finished: Path, script: tuple[str, ...]
) -> None:
    before = contents(finished)
    message = refused(*script, "--run_dir", finished, "meta.inner_lr=0.25")
    assert message.startswith(f"{finished}: made by another configuration, meta.inner_lr: 1.0 there, 0.25 here")
    assert contents(finished) == before


def test_training_anew_in_a_folder_that_holds_a_run_is_refused(refused: Refused, finished: Path) -> None:
    before = contents(finished)
    assert refused("run.py", "--no-resume", "--run_dir", finished).startswith(f"{finished}: already holds a run")
    assert contents(finished) == before


def test_more_experts_than_domains_is_told(refused: Refused, tmp_path: Path) -> None:
    message = refused("run.py", "--run_dir", tmp_path / "run", "experts.count=30")
    assert message.startswith("experts.count: 30 experts need as many source domains, the data set has 24")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("meta.support_size=3000", "meta.support_size"),
        ("aggregator.heads=7", "aggregator.heads"),
        ("experts.backbone.name=resnet19", "backbone.name"),
        ("student.backbone.name=resnet18", "student.backbone"),
    ],
)
def test_what_cannot_work_later_is_told_before_anything_is_trained(
    refused: Refused, tmp_path: Path, override: str, field: str
) -> None:
    message = refused("run.py", "--run_dir", tmp_path / "run", *ONE_STEP, override)
    assert message.startswith(field)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_work_leaves_no_run_folder_in_the_way_of_the_mended_command(refused: Refused, tmp_path: Path) -> None:
    refused("run.py", "--run_dir", tmp_path / "run", "meta.support_size=100000")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [-1, 6])
def test_expert_that_does_not_exist_is_told(refused: Refused, tmp_path: Path, number: int) -> None:
    message = refused("train_single_expert.py", "--run_dir", tmp_path / "run", "--expert_idx", number)
    assert message == f"--expert_idx: must be 0 to 5, got {number}"


@pytest.mark.skipif(torch.cuda.device_count() > 9, reason="there is such a GPU")
@pytest.mark.parametrize("script", [("run.py",), ("train_single_expert.py", "--expert_idx", "0")])
def test_gpu_that_is_not_there_is_told(refused: Refused, tmp_path: Path, script: tuple[str, ...]) -> None:
    message = refused(*script, "--run_dir", tmp_path / "run", "--gpu", "9")
    assert message.startswith("--gpu: no GPU 9 here")
    assert not (tmp_path / "run").exists()


def test_threads_below_one_are_told(refused: Refused, tmp_path: Path) -> None:
    assert refused("run.py", "--run_dir", tmp_path / "run", "--threads", "0").startswith("--threads: must be >= 1, got 0")


def test_missing_expert_is_told_by_its_number(refused: Refused, damaged: Path) -> None:
    (damaged / "experts" / "expert_03" / "manifest.json").unlink()
    before = contents(damaged)
    message = refused("run.py", "--load_trained_experts", "--run_dir", damaged)
    assert message.startswith(f"{damaged / 'experts' / 'expert_03'}: expert 3 is not trained: python train_single_expert.py ")
    assert contents(damaged) == before


def test_command_that_is_offered_for_a_missing_expert_fits_a_run_with_overrides(refused: Refused, tmp_path: Path) -> None:
    message = refused("run.py", "--load_trained_experts", "--run_dir", tmp_path / "run", *ONE_STEP)
    offered = message.split("python ", maxsplit=1)[1].split()
    ended = call(*offered)
    assert ended.status == 0, ended
    assert (tmp_path / "run" / "experts" / "expert_00" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    "file", ["meta/weights.safetensors", "experts/expert_02/weights.safetensors", "student/weights.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_testing_a_run_with_a_missing_or_cut_off_weights_file_is_told(
    refused: Refused, damaged: Path, file: str, damage: str
) -> None:
    path = damaged / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    before = contents(damaged)
    assert refused("run.py", "--test", "--run_dir", damaged).startswith(f"{path}: ")
    assert contents(damaged) == before


def test_training_on_with_a_cut_off_expert_is_told_and_touches_nothing(refused: Refused, damaged: Path) -> None:
    path = damaged / "experts" / "expert_02" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = contents(damaged)
    assert refused("run.py", "--run_dir", damaged).startswith(f"{path}: changed or cut off")
    assert contents(damaged) == before


def test_unfinished_run_cannot_be_tested(refused: Refused, damaged: Path) -> None:
    (damaged / "model.json").unlink()
    assert refused("run.py", "--test", "--run_dir", damaged).startswith(f"{damaged}: the run is not finished")


def test_pretrained_stage_that_is_asked_for_and_missing_is_told(tmp_path: Path) -> None:
    options = Namespace(
        dataset=None,
        config=None,
        run_dir=tmp_path,
        data_dir=None,
        gpu=-1,
        threads=1,
        seed=None,
        parent=None,
        overrides=ONE_STEP,
    )
    from dmoe import stages

    with pytest.raises(UserError, match="no finished student here"):
        stages.pretrain_student(open_run(options), only_load=True)


@pytest.mark.slow
def test_interrupt_while_experts_train_leaves_one_line_and_no_process(tmp_path: Path, interruptible: None) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "run.py", "--run_dir", str(folder), *ONE_STEP, "experts.training.duration=1000000 steps"]
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            while not any("step" in log.read_text() for log in folder.glob("experts/*/log.txt")):
                assert process.poll() is None and time.monotonic() - began < 100
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
            left = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit() and str(folder) in command_of(entry)]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert err.startswith("interrupted: ") and err.count("\n") == 1, err
    assert left == []


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has ended meanwhile
        return ""
