"""The ablations: which runs are made, what they begin with, and the rows and the table of what they reached."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, rows, weights

from dmoe.compare.tasks import Task
from dmoe.config import load_config
from dmoe.errors import UserError
from scripts import ablations as script
from scripts.ablations import FULL, GROUPS, Row, ablations_of, main, row_of, table

SCORES = {FULL: 0.8, "mask_none": 0.6}


class Runs:
    """Stands in for processes: notes the tasks, and leaves what a run leaves behind."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begun: dict[str, list[str]] = {}
        self.failing: set[str] = set()

    def __call__(self, tasks: Mapping[str, Task], *, at_once: int, logs: Path, name: str) -> None:
        self.calls.append(list(tasks))
        for task in tasks.values():
            words = list(task.arguments)
            folder, seed = Path(words[words.index("--run_dir") + 1]), int(words[words.index("--seed") + 1])
            self.begun[folder.name] = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
            if folder.name in self.failing:
                raise UserError(f"{folder.name} failed")
            for stage in ("experts", "tokens", "aggregator", "student", "meta"):
                (folder / stage).mkdir(parents=True, exist_ok=True)
                (folder / stage / "lock").touch()
                if not (folder / stage / "made").exists():
                    (folder / stage / "made").write_text(folder.name)
            overrides = [word for word in words if "=" in word]
            config = load_config(script.CONFIG_FOLDER / "digits.yaml", overrides, seed=seed)
            write(folder, result(SCORES.get(folder.name, 0.5) + 0.01 * seed, seed=seed, config=config.model_dump(mode="json")))


def result(accuracy: float, **changes: Any) -> dict[str, Any]:
    """A line of a run's results.jsonl."""
    return {
        "method": "adapted",
        "dataset": "digits",
        "split": "target",
        "seed": 1,
        "metric": "accuracy",
        "unit": "fraction",
        "overall": {"accuracy": accuracy},
        "mean": accuracy,
        "worst": accuracy - 0.1,
        "domains": {"45 degrees": {"accuracy": accuracy, "macro_f1": 0.1}},
        "support_size": 64,
        "score_support": True,
        "config": {},
        "data": "d",
        "versions": {"torch": "2"},
        **changes,
    }


def write(folder: Path, row: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(script, "run_tasks", made)
    return made


def ablate(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--out", str(out), *arguments])
    main()


def test_each_setting_changes_what_it_says_and_nothing_else() -> None:
    found = ablations_of("digits", 3)
    full = next(each for each in found if each.name == FULL).config
    assert [each.setting.group for each in found if each.name == FULL] == list(GROUPS), "one run for all groups"
    assert full == load_config(script.CONFIG_FOLDER / "digits.yaml", seed=3)
    for each in found:
        section = getattr(full, each.setting.section)
        plain = {name: value for name, value in each.config if name != each.setting.section}
        assert plain == {name: value for name, value in full if name != each.setting.section}
        changed = {name for name, value in getattr(each.config, each.setting.section) if value != getattr(section, name)}
        assert changed <= {override.split(".")[1].split("=")[0] for override in each.setting.overrides}
        assert bool(changed) == (each.name != FULL)
    assert len({each.name for each in found}) == 16


def test_a_number_of_experts_of_its_own_is_a_setting_too() -> None:
    found = [each for each in ablations_of("digits", 1, ["experts.count=5"]) if each.setting.group == "experts"]
    assert [(each.setting.title, each.config.experts.count) for each in found] == [(str(n), n) for n in (5, 2, 3, 4, 6, 8, 12)]
    assert [each.setting.title for each in found if each.name == FULL] == ["5"]


def test_what_is_ablated_cannot_be_changed_for_all() -> None:
    with pytest.raises(UserError, match=r"^command line: meta\.learns and meta\.student_start are the settings' own"):
        ablations_of("digits", 1, ["meta.learns=student", "meta.student_start=random"])


def test_the_whole_method_comes_first_and_lends_the_stages_that_a_setting_leaves_alone(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablate(monkeypatch, tmp_path, "--seeds", "1", "2")
    assert runs.calls[0] == ["seed_1_full", "seed_2_full"]
    assert len(runs.calls[1]) == 2 * 15
    assert runs.begun["mask_none"] == ["aggregator", "experts", "student", "tokens"]
    assert runs.begun["pooling_max"] == ["experts", "student", "tokens"]
    assert runs.begun["count_2"] == ["student"]
    lent = tmp_path / "seed_2" / "mask_none" / "experts"
    assert [path.name for path in lent.iterdir() if path.name != "lock"] == ["made"]
    assert (lent / "made").read_text() == FULL
    assert (tmp_path / "seed_2" / "mask_none" / "meta" / "made").read_text() == "mask_none"


def test_what_is_finished_is_not_run_again_and_what_was_cut_off_is(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.failing = {"mask_zero"}
    with pytest.raises(UserError, match="mask_zero failed"):
        ablate(monkeypatch, tmp_path, "--seeds", "1", "--groups", "mask")
    assert {row["setting"] for row in rows(tmp_path) if row["group"] == "mask"} == {"none", "remove"}, "is kept all the same"
    runs.failing = set()
    ablate(monkeypatch, tmp_path, "--seeds", "1", "--groups", "mask")
    assert runs.calls[-2:] == [[], ["seed_1_mask_zero"]]


def test_a_run_tested_by_another_configuration_is_run_again(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    ablate(monkeypatch, tmp_path, "--seeds", "1", "--groups", "mask")
    ablate(monkeypatch, tmp_path, "evaluation.support_size=8", "--seeds", "1", "--groups", "mask")
    assert runs.calls[2:] == [["seed_1_full"], ["seed_1_mask_none", "seed_1_mask_zero"]]


def test_the_rows_are_those_of_a_comparison(tmp_path: Path) -> None:
    ablation = next(each for each in ablations_of("digits", 1) if each.name == "mask_none")
    assert row_of(ablation, result(0.75), tmp_path) == {
        "kind": "ablation",
        "group": "mask",
        "setting": "none",
        "method": "Meta-DMoE",
        "dataset": "digits",
        "split": "target",
        "protocol": "per domain",
        "support_size": 64,
        "score_support": True,
        "predict": "after",
        "seed": 1,
        "metric": "accuracy",
        "unit": "fraction",
        "mean": 0.75,
        "worst": 0.65,
        "overall": {"accuracy": 0.75},
        "domains": {"45 degrees": 0.75},
        "run": "seed_1/mask_none",
        "data": "d",
        "versions": {"torch": "2"},
    }


def test_the_table_has_mean_and_deviation_over_seeds(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablate(monkeypatch, tmp_path, "--seeds", "1", "3", "--groups", "mask")
    assert capsys.readouterr().out.splitlines() == [
        "| digits, target domains, accuracy in percent | | mean of domains | worst domain | seeds |",
        "|---|---|---|---|---|",
        "| mask | none | 62.0 ± 1.4 | 52.0 ± 1.4 | 2 |",
        "| mask | zero | 52.0 ± 1.4 | 42.0 ± 1.4 | 2 |",
        "| mask | remove | 82.0 ± 1.4 | 72.0 ± 1.4 | 2 |",
    ]


def test_without_a_finished_run_there_is_no_table() -> None:
    assert table([]) == "no run is finished"


@pytest.mark.parametrize("arguments", [["--seeds", "1", "1"], ["--seeds", "-1"], ["--processes", "0"], ["--dataset", "moons"]])
def test_what_makes_no_sense_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--(processes must be|dataset: 'moons' is unknown)"):
        ablate(monkeypatch, tmp_path, *arguments)


@pytest.mark.slow
def test_real_runs_share_their_stages_and_differ_in_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ablate(monkeypatch, tmp_path, *SMALL, "--seeds", "1", "--groups", "aggregator")
    found: dict[str, Row] = {row["setting"]: row for row in rows(tmp_path) if row["group"] == "aggregator"}
    assert list(found) == ["max", "mean", "transformer"]
    assert len({row["mean"] for row in found.values()}) == 3
    full, mean = (weights(tmp_path / "seed_1" / name) for name in (FULL, "pooling_mean"))
    assert {name for name in full if full[name] != mean[name]} == {
        f"{stage}/weights.safetensors" for stage in ("aggregator", "meta")
    }
