"""Several seeds and methods: what is started after what, and a small comparison from beginning to end."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from told import one_line

from dmoe.compare import comparison
from dmoe.compare.candidates import CANDIDATES, GROUPS
from dmoe.compare.comparison import candidates_of, compare
from dmoe.compare.tasks import Task
from dmoe.errors import UserError
from scripts.make_folder_sample import write_sample

ROOT = Path(__file__).resolve().parent.parent.parent
USUAL = GROUPS["usual"]
METHODS = ["erm", "tent", "meta_dmoe", "before"]
WORDS = [
    *("--dataset", "folders", "--config", "configs/small_pictures.yaml", "--gpu", "-1", "--threads", "1"),
    'data.target_domains=["045_degrees","225_degrees"]',
    'data.validation_domains=["030_degrees"]',
    "experts.count=3",
    "experts.training.duration=10 steps",
    "aggregator.training.duration=10 steps",
    "student.training.duration=20 steps",
    "meta.duration=6 steps",
    "meta.support_size=8",
    "meta.query_size=8",
    "meta.inner_lr=0.1",
    "compare.trials=2",
    "compare.support_sizes=[4]",
    "compare.stream_images=16",
    f"compare.methods={json.dumps(METHODS)}",
]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, Task]:
    """The tasks of a comparison of two seeds."""
    seen: dict[str, Task] = {}
    monkeypatch.setattr(comparison, "run_tasks", lambda tasks, **_: seen.update(tasks))
    compare(tmp_path, [3, 1], run=["run.py"], flags=["--threads", "1"], at_once=2)
    return seen


def test_every_method_waits_for_the_run_of_its_seed(started: Mapping[str, Task]) -> None:
    assert all(f"seed_{seed}" in started[f"seed_{seed}_{key}"].needs for seed in (1, 3) for key in USUAL)


def test_what_adapts_the_long_trained_student_waits_for_it(started: Mapping[str, Task]) -> None:
    waiting = {key for key in USUAL if "seed_3_erm" in started[f"seed_3_{key}"].needs}
    assert waiting == {key for key, candidate in CANDIDATES.items() if candidate.adapts_erm} != set()


def test_other_seeds_wait_for_the_first_one_which_chooses_the_settings(started: Mapping[str, Task]) -> None:
    assert all(f"seed_3_{key}" in started[f"seed_1_{key}"].needs for key in USUAL)
    assert not any(f"seed_1_{key}" in started[f"seed_3_{key}"].needs for key in USUAL)
    assert all(Path(_after(started[f"seed_1_{key}"], "--chosen_by")).name == "seed_3" for key in USUAL)


def test_what_trains_starts_before_what_adapts_the_student_that_one_of_them_trained(started: Mapping[str, Task]) -> None:
    of_one_seed = [name.removeprefix("seed_3_") for name in started if name.startswith("seed_3_")]
    adapting = [CANDIDATES[key].adapts_erm for key in of_one_seed]
    assert adapting == sorted(adapting) and of_one_seed[0] == "erm"


def _after(task: Task, flag: str) -> str:
    return task.arguments[list(task.arguments).index(flag) + 1]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["tenta"], r"compare\.methods: 'tenta' is unknown; use some of erm, "),
        (["tent"], r"compare\.methods: tent adapts the ERM student that the method erm trains: name erm too"),
    ],
)
def test_methods_that_cannot_be_compared_are_one_line(names: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        candidates_of(names)
    assert one_line(error)


def test_methods_come_in_the_order_of_the_table() -> None:
    assert list(candidates_of(["meta_dmoe", "erm"])) == ["erm", "meta_dmoe"]
    assert list(candidates_of([])) == [key for key in CANDIDATES if key in USUAL]


def test_groups_of_methods_have_one_name() -> None:
    assert list(candidates_of(["objectives"])) == [
        *("erm", "coral", "irm", "mmd", "dann", "fish", "fishr", "group_dro", "miro", "swad", "miro_of_student")
    ]
    assert set(USUAL) & set(GROUPS["objectives"]) == {"erm", "coral", "irm"}
    sparse = ["gmoe", "emoe", "meta_dmoe_gmoe", "meta_dmoe_emoe"]
    assert list(candidates_of(["sparse"])) == ["erm", "gmoe", "emoe", "meta_dmoe", "meta_dmoe_gmoe", "meta_dmoe_emoe"]
    assert not set(USUAL) & set(sparse)
    assert list(candidates_of(["objectives", "usual", *sparse])) == list(CANDIDATES)
    assert list(candidates_of(["tent", "objectives"])) == [key for key in CANDIDATES if key in {"tent", *GROUPS["objectives"]}]


@pytest.mark.parametrize(("processes", "seeds", "threads"), [(2, [1], "2"), (4, [1, 2], "2"), (2, [1, 2, 3], "1")])
def test_experts_take_the_cores_that_other_runs_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int, seeds: list[int], threads: str
) -> None:
    import run
    from dmoe.report import __main__ as report

    seen: dict[str, list[str]] = {}
    monkeypatch.setattr(comparison, "compare", lambda folder, seeds, **words: seen.update(words))
    monkeypatch.setattr(report, "main", lambda words: None)
    words = ["--compare", "--processes", str(processes), "--threads", "1", "--run_dir", str(tmp_path), "--seeds", *map(str, seeds)]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    run.main()
    assert seen["run"][seen["run"].index("--expert_threads") + 1] == threads
    assert seen["flags"][seen["flags"].index("--threads") + 1] == "1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--test"], "--compare: it makes whole runs"),
        (["--seeds", "1", "1"], "each once"),
        (["--processes", "0"], "--processes must be 1 at least"),
        (["--expert_threads", "0"], "--expert_threads: must be >= 1"),
        (["--expert_threads", "1000000000000"], "--expert_threads: must be <= 4096"),
        (["compare.trials=0"], "compare.trials"),
        (['compare.methods=["tenta"]'], "'tenta' is unknown"),
    ],
)
def test_bad_flags_end_in_one_line_before_anything_starts(tmp_path: Path, words: list[str], told: str) -> None:
    ended = _run(tmp_path / "out", "--compare", *words)
    assert ended.returncode == 2
    assert told in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_comparison_ends_in_results_and_a_page_and_goes_on_with_another_seed(tmp_path: Path) -> None:
    write_sample(tmp_path / "pictures", images_per_class=8)
    words = [*WORDS, "--compare", "--data_dir", str(tmp_path / "pictures")]
    ended = _run(tmp_path / "out", *words, "--seeds", "1")
    assert ended.returncode == 0, ended.stderr
    first = _rows(tmp_path / "out")
    assert {row["method"] for row in first} == {CANDIDATES[key].name for key in METHODS}

    ended = _run(tmp_path / "out", *words, "--seeds", "1", "2")
    assert ended.returncode == 0, ended.stderr
    rows = _rows(tmp_path / "out")
    assert [row for row in rows if row["seed"] == 1] == first
    tests = [row for row in rows if row["kind"] == "test"]
    assert {(row["method"], row["seed"]) for row in tests} == {(CANDIDATES[key].name, seed) for key in METHODS for seed in (1, 2)}
    assert {row["seed"] for row in rows if row["kind"] == "trial"} == {1}, "the first seed chooses for all"
    assert _steps(tmp_path / "out", "seed_1") == _steps(tmp_path / "out", "seed_2"), "and its budget is that of all"
    logs = "".join(path.read_text() for path in (tmp_path / "out" / "logs").glob("seed_1_*.txt"))
    assert logs.count("already finished from the same inputs") >= len(METHODS), "nothing is done twice"
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(CANDIDATES[key].name in page for key in METHODS)


def _run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "run.py", "--run_dir", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _steps(folder: Path, seed: str) -> int:
    manifest = json.loads((folder / seed / "compare" / "erm" / "manifest.json").read_text())
    return int(manifest["figures"]["steps"])
