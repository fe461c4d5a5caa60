"""Array jobs: what is in their script, what becomes of their tasks, and that they end in the same weights.

There is no Slurm here. A program of its name runs the tasks, two at a time, as the options in the script say.
"""

import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from noise import run_in
from small_experts import EXPERTS, Weights, open_small, weights_of
from told import names, one_line

from dmoe.errors import UserError
from dmoe.run import Run
from experts import slurm
from experts.launch import train_all_experts
from experts.process import End, log_of
from experts.slurm import Slurm, script

SBATCH = """#!{python} -S
import concurrent.futures, os, shlex, subprocess, sys

path = sys.argv[-1]
lines = [line.removeprefix("#SBATCH ") for line in open(path) if line.startswith("#SBATCH ")]
options = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line))
options.update(word.partition("=")[::2] for word in sys.argv[1:-1])
with open({calls!r}, "a") as file:
    print(options["--array"], options["--job-name"], sep="\\t", file=file)
if "--partition" in options:
    sys.exit("sbatch: error: invalid partition specified: " + options["--partition"])
print("4711", flush=True)

def train(number):
    output = options["--output"].replace("%2a", number.zfill(2)).replace("%%", "%")
    with open(output, "a" if options["--open-mode"] == "append" else "w") as log:
        environment = dict(os.environ, SLURM_ARRAY_TASK_ID=number)
        return subprocess.run(["bash", path], stdout=log, stderr=log, env=environment, cwd="/").returncode

with concurrent.futures.ThreadPoolExecutor(2) as nodes:
    sys.exit(max(nodes.map(train, options["--array"].split(","))))
"""
SCANCEL = """#!{python} -S
import sys
with open({calls!r}, "a") as file:
    print("cancelled", *sys.argv[1:], sep="\\t", file=file)
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs on the PATH; a line a call in this file: the array and the job's name."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(python=sys.executable, calls=str(calls)))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return calls


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = run_in(tmp_path / "a run's 100% folder", "experts.count=4", "experts.threads=3")
    for number in range(4):
        log_of(run, number).parent.mkdir(parents=True)
    return run


def trains_by(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Instead of training, a task runs these lines of bash, in which $number is the expert."""
    words = ["bash", "-c", f"number=${{@: -1}}; {text}", "train"]
    monkeypatch.setattr(slurm, "command", lambda run, *flags: words)


def options_of(text: str) -> list[str]:
    return [word for line in text.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]


def all_ends(launcher: Slurm, count: int) -> list[End]:
    ends, began = [], time.monotonic()
    while len(ends) < count:
        assert time.monotonic() - began < 60
        ends += launcher.ended()
        time.sleep(0.01)
    return ends


def test_script_asks_for_an_array_of_the_given_experts_with_a_gpu_each(run: Run) -> None:
    options = options_of(script(run, [0, 3], gpu=True))
    folder = f"{run.folder.path}".replace("%", "%%")
    assert options == [
        "--job-name=experts",
        "--array=0,3",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/experts/expert_%2a/log.txt",
        "--cpus-per-task=3",
        "--gres=gpu:1",
    ]


def test_script_asks_for_no_gpu_where_none_is_wanted(run: Run) -> None:
    text = script(run, [0], gpu=False)
    assert not any("gres" in option for option in options_of(text))
    assert "--gpu -1" in text and "--threads 3" in text


def test_users_options_come_last_and_may_name_the_gpu(run: Run) -> None:
    theirs = ["--partition=gpu", "--comment=two words", "--gpus=a100:1"]
    run = run_in(run.folder.path, f"experts.slurm_options={theirs}")
    options = options_of(script(run, [0], gpu=True))
    assert options[-3:] == theirs
    assert "--gres=gpu:1" not in options


@pytest.mark.parametrize("name", ["back\\slash", "two\nlines", "tab\t"])
def test_path_that_sbatch_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        script(run_in(tmp_path / name), [0], gpu=False)
    assert one_line(caught).startswith("--launcher slurm: backslashes and control characters do not fit into its script")


def test_without_sbatch_the_script_is_written_and_the_line_says_what_to_type(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as caught:
        Slurm(run, gpu=-1).start([1, 2])
    path = run.folder.path / "experts" / "experts.sbatch"
    assert f"type: {shlex.join(['sbatch', '--wait', str(path)])}; after its end" in one_line(caught)
    assert path.read_text() == script(run, [1, 2], gpu=False)


def test_refusal_by_sbatch_is_told_in_its_words(run: Run, calls: Path) -> None:
    launcher = Slurm(run_in(run.folder.path, "experts.slurm_options=[--partition=nowhere]"), gpu=-1)
    launcher.start([0])
    with pytest.raises(UserError) as caught:
        all_ends(launcher, 1)
    launcher.stop()
    assert one_line(caught).endswith("experts.sbatch: sbatch: error: invalid partition specified: nowhere")


def test_tasks_tell_their_status_and_leave_nothing_but_their_log(run: Run, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trains_by(monkeypatch, "echo expert $number; [ $number = 1 ] && kill -9 $$; exit $number")
    launcher = Slurm(run, gpu=-1)
    assert launcher.start([0, 1, 2, 3]) == 4
    assert sorted(all_ends(launcher, 4)) == [End(0, 0), End(1, -9), End(2, 2), End(3, 3)]
    launcher.stop()
    for number in range(4):
        assert names(log_of(run, number).parent) == ["log.txt"]
        assert log_of(run, number).read_text().startswith(f"expert {number}\n")


def test_failed_task_comes_again_in_an_array_of_its_own(run: Run, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shlex.quote(f"{run.folder.path}/experts")
    fails_once = "if [ $number = 2 ] && mkdir tried 2> /dev/null; then exit 1; fi"
    trains_by(monkeypatch, f"cd {folder}/expert_0$number; {fails_once}; echo {{}} > manifest.json")
    monkeypatch.setattr(Slurm, "poll_seconds", 0.05)
    train_all_experts(run, launcher="slurm", gpu=-1)
    assert [line.split("\t")[0] for line in calls.read_text().splitlines()] == ["0,1,2,3", "2"]


def test_interrupted_task_is_told_as_such_once_the_job_is_over(run: Run, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "SETTLE_SECONDS", 0.0)
    trains_by(monkeypatch, "[ $number = 0 ] || exit 143")
    launcher = Slurm(run, gpu=-1)
    launcher.start([0, 1])
    ends = sorted(all_ends(launcher, 2))
    assert ends == [End(0, 0), End(1, 143)]
    assert ends[1].interrupted


def test_stopping_cancels_the_job(run: Run, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trains_by(monkeypatch, "sleep 3")
    launcher = Slurm(run, gpu=-1)
    launcher.start([0])
    began = time.monotonic()
    while not calls.exists() or not calls.read_text().endswith("\n"):
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    launcher.stop()
    submitted, cancelled = calls.read_text().splitlines()
    assert cancelled == f"cancelled\t--name={submitted.split()[1]}"


@pytest.mark.slow
def test_body_of_the_script_run_by_hand_for_a_task_gives_the_same_weights(undisturbed: Weights, tmp_path: Path) -> None:
    run = open_small(tmp_path / "a run")
    for number in range(EXPERTS):
        log_of(run, number).parent.mkdir(parents=True)
    path = tmp_path / "experts.sbatch"
    path.write_text(script(run, range(EXPERTS), gpu=False))
    for number in (1, 4):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        subprocess.run(["bash", str(path)], env=environment, cwd="/", check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert weights_of(tmp_path / "a run") == {name: undisturbed[name] for name in ("expert_01", "expert_04")}


@pytest.mark.slow
def test_array_job_gives_the_same_weights_and_leaves_finished_experts_alone(
    undisturbed: Weights, tmp_path: Path, calls: Path
) -> None:
    run = open_small(tmp_path / "run")
    train_all_experts(run, launcher="slurm", gpu=-1)
    assert weights_of(tmp_path / "run") == undisturbed
    changed = {path: path.stat().st_mtime_ns for path in run.folder.path.glob("experts/expert_*/*")}
    run.expert_stage(3).manifest.unlink()
    train_all_experts(run, launcher="slurm", gpu=-1)
    assert weights_of(tmp_path / "run") == undisturbed
    assert [line.split("\t")[0] for line in calls.read_text().splitlines()] == ["0,1,2,3,4,5", "3"]
    kept = {path: time for path, time in changed.items() if path.parent.name != "expert_03"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
