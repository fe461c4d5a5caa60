"""Leaving out each domain in turn: which runs are started, what is read from them, and the table."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripts.leave_one_out import Cell, domains_of, main, read_results, tables

from dmoe.errors import UserError
from scripts import leave_one_out as script
from tests.told import one_line

DOMAINS = ("art", "photo", "sketch")


def row(method: str, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    return {
        "method": method,
        "split": "target",
        "seed": 1,
        "metric": "accuracy",
        "reported": {"accuracy": "accuracy"},
        "mean": accuracy,
        "worst": accuracy,
        "overall": {"accuracy": accuracy},
        "domains": {},
        **changes,
    }


def write(folder: Path, *rows: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def cells(table: str) -> list[list[str]]:
    """The cells of a table in markdown, without the rule."""
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for domain in DOMAINS:
        for name in ("cat", "dog"):
            path = tmp_path / "pictures" / domain / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(path)
    return tmp_path / "pictures"


class Runs:
    """Stands in for run.py: records commands, writes a result, and fails where it is told to."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.failing: set[str] = set()

    def __call__(self, command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        folder = Path(command[command.index("--run_dir") + 1])
        if f"{folder.parent.name}/{folder.name}" in self.failing:
            return subprocess.CompletedProcess(command, 2)
        seed = int(command[command.index("--seed") + 1])
        write(folder, row("adapted", 0.5 + 0.1 * DOMAINS.index(folder.parent.name) + 0.02 * seed))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(subprocess, "run", made)
    return made


def leave_out(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["leave_one_out.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_each_domain_is_left_out_with_each_seed(
    pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("--data_dir", pictures, "--out", out, "--seeds", "1", "2", "1", "meta.inner_lr=0.1")
    assert leave_out(monkeypatch, *arguments) == 0
    expected = [
        [
            *(sys.executable, str(script.RUN), "--dataset", "folders", "--data_dir", str(pictures)),
            *("--run_dir", str(out / domain / f"seed_{seed}"), "--seed", str(seed)),
            *("meta.inner_lr=0.1", f'data.target_domains=["{domain}"]'),
        ]
        for domain in DOMAINS
        for seed in (1, 2)
    ]
    assert runs.commands == expected


def test_a_seed_that_is_no_number_is_told(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--data_dir", str(pictures), "--out", str(tmp_path / "out"), "--seeds", "1", "two"])
    with pytest.raises(UserError, match="--seeds: must be whole numbers, got 'two'"):
        main()


def test_flags_are_handed_on(pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--config", "mine.yaml", "--gpu", "-1", "--threads", "2")
    leave_out(monkeypatch, "--data_dir", pictures, "--out", tmp_path / "out", *flags)
    for command in runs.commands:
        start = command.index("--config")
        assert tuple(command[start : start + 6]) == flags


def test_the_table_comes_last(
    pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out(monkeypatch, "--data_dir", pictures, "--out", tmp_path / "out", "--seeds", "1", "2")
    assert cells(capsys.readouterr().out) == [
        ["accuracy in percent", "art", "photo", "sketch", "mean"],
        ["adapted", "53.0 ± 1.4", "63.0 ± 1.4", "73.0 ± 1.4", "63.0 ± 1.4"],
    ]


def test_a_failed_run_is_named_the_others_go_on_and_the_status_is_1(
    pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.failing = {"photo/seed_1"}
    write(tmp_path / "out" / "photo" / "seed_1", row("adapted", 0.99))  # of an earlier visit
    assert leave_out(monkeypatch, "--data_dir", pictures, "--out", tmp_path / "out") == 1
    told = capsys.readouterr()
    assert len(runs.commands) == 3
    assert told.err.splitlines()[-1] == "failed: photo, seed 1: exit status 2"
    assert cells(told.out)[1] == ["adapted", "52.0", "-", "72.0", "-"]


def test_where_all_runs_fail_there_is_no_table(
    pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.failing = {f"{domain}/seed_1" for domain in DOMAINS}
    assert leave_out(monkeypatch, "--data_dir", pictures, "--out", tmp_path / "out") == 1
    assert "|" not in capsys.readouterr().out


def test_a_run_without_results_has_failed(
    pictures: Path, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 0))
    assert leave_out(monkeypatch, "--data_dir", pictures, "--out", tmp_path / "out") == 1
    assert "results.jsonl: cannot be read" in capsys.readouterr().err


def test_the_last_result_of_a_method_on_the_target_split_counts(tmp_path: Path) -> None:
    rows = [row("adapted", 0.1), row("ERM student", 0.4), row("adapted", 0.2), row("adapted", 0.9, split="validation")]
    found = read_results(write(tmp_path, *rows))
    assert {method: one["overall"]["accuracy"] for method, one in found.items()} == {"adapted": 0.2, "ERM student": 0.4}


@pytest.mark.parametrize("damage", ["{", "[]", '{"split": "target"}', "3"])
def test_a_damaged_line_is_told_with_its_number(tmp_path: Path, damage: str) -> None:
    write(tmp_path, row("adapted", 0.1))
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(damage)
    with pytest.raises(UserError) as caught:
        read_results(tmp_path)
    assert one_line(caught).startswith(f"{tmp_path / 'results.jsonl'}: line 2: damaged")


def test_results_on_other_splits_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no result on the target split"):
        read_results(write(tmp_path, row("adapted", 0.1, split="validation")))


def test_rows_are_methods_and_the_mean_is_over_domains_seed_by_seed() -> None:
    values = {("art", 1): 0.1, ("art", 2): 0.3, ("photo", 1): 0.5, ("photo", 2): 0.5}
    results = {
        Cell(domain, seed): {"ERM student": row("ERM student", value / 2), "adapted": row("adapted", value)}
        for (domain, seed), value in values.items()
    }
    text = tables(results, domains=["art", "photo"])
    assert cells(text) == [
        ["accuracy in percent", "art", "photo", "mean"],
        ["ERM student", "10.0 ± 7.1", "25.0 ± 0.0", "17.5 ± 3.5"],
        ["adapted", "20.0 ± 14.1", "50.0 ± 0.0", "35.0 ± 7.1"],
    ]
    assert text.endswith("Mean ± standard deviation over seeds 1, 2.")


def test_a_seed_that_lacks_a_domain_is_left_out_of_the_mean() -> None:
    values = {("art", 1): 0.1, ("art", 2): 0.3, ("photo", 2): 0.5}
    results = {Cell(*key): {"adapted": row("adapted", value)} for key, value in values.items()}
    assert cells(tables(results, domains=["art", "photo"]))[1] == ["adapted", "20.0 ± 14.1", "50.0", "40.0"]


def test_every_reported_metric_has_a_table() -> None:
    reported = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    rows = {"adapted": row("adapted", 0.5, reported=reported, overall={"accuracy": 0.5, "macro_f1": 0.25})}
    found = cells(tables({Cell("art", 1): rows}, domains=["art"]))
    assert found == [
        *(["accuracy in percent", "art", "mean"], ["adapted", "50.0", "50.0"]),
        *(["macro F1 in percent", "art", "mean"], ["adapted", "25.0", "25.0"]),
    ]


def test_metrics_of_values_are_not_in_percent_and_may_be_undefined() -> None:
    reported = {"r": "r", "mse": "mean squared error"}
    rows = {"adapted": row("adapted", None, metric="r", reported=reported, overall={"r": None, "mse": 12.5})}
    assert cells(tables({Cell("art", 1): rows}, domains=["art"])) == [
        *(["r", "art", "mean"], ["adapted", "-", "-"]),
        *(["mean squared error", "art", "mean"], ["adapted", "12.500", "12.500"]),
    ]


@pytest.mark.parametrize(
    ("domain", "name"),
    [("Real World", "Real World"), ("a/b", "a%2Fb"), ("a%2Fb", "a%252Fb"), ("..", "%2E."), (".hidden", "%2Ehidden")],
)
def test_every_domain_has_a_folder_of_its_own_below_out(domain: str, name: str) -> None:
    assert Cell(domain, 3).folder(Path("out")) == Path("out") / name / "seed_3"


def test_a_domain_reaches_the_configuration_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    from dmoe.config import load_config

    names = ["no", "007", "a: b, c", "Größe", '"quoted"']
    table = tmp_path / "images.csv"
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    table.write_text("path,label,domain\n" + "".join(f"{i}.png,cat,{name}\n" for i, name in enumerate(quoted)), encoding="utf-8")
    monkeypatch.setattr(script, "read_results", lambda folder: {"adapted": row("adapted", 0.5)})
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: runs.commands.append(command) or subprocess.CompletedProcess(command, 0)
    )
    assert leave_out(monkeypatch, "--data_dir", table, "--out", tmp_path / "out") == 0
    shipped = script.RUN.parent / "configs" / "folders.yaml"
    reached = [load_config(shipped, [command[-1]]).data.target_domains for command in runs.commands]
    assert sorted(reached) == sorted((name,) for name in names)


def test_a_table_with_splits_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("path,label,domain,split\na.png,cat,a,train\n")
    with pytest.raises(UserError, match="its column split says what is tested on"):
        domains_of(tmp_path / "images.csv")


def test_one_domain_cannot_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("path,label,domain\na.png,cat,a\n")
    with pytest.raises(UserError, match="holds one domain, a"):
        domains_of(tmp_path / "images.csv")


def test_a_missing_folder_ends_in_one_line_and_status_2(tmp_path: Path) -> None:
    path = Path(script.__file__)
    command = [sys.executable, str(path), "--data_dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
