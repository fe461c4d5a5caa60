"""The end of a run: tables, rows of results, files of predictions."""

import ast
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from told import names, one_line
from torch import Tensor

from dmoe import testing
from dmoe.adaptation import Adapter
from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.data.wilds import SPLITS
from dmoe.diagnosis import Diagnosis, Range, Ranges
from dmoe.errors import SuspectAdaptation, UserError
from dmoe.evaluation import Evaluation
from dmoe.models.student import Student
from dmoe.run import Run
from dmoe.run_folder import RunFolder
from dmoe.tasks import Task
from dmoe.testing import Trained, domain_table, overall_table, predictions_name, result_row, write_predictions

CLASSES, VALUES = Task("multiclass", num_outputs=3), Task("regression", num_outputs=1)
NAMES = {4: "north", 7: "south"}
SUPPORT = 2


class Twelve(DomainSplit):
    """Image i is the number i; even ones are of domain 4, odd ones of domain 7."""

    def __init__(self, task: Task = CLASSES) -> None:
        number = torch.arange(12)
        self.labels = number % 3 if task.kind == "multiclass" else number / 12
        self.domains = self.group_domains = torch.where(number % 2 == 0, 4, 7)
        self.domain_names = NAMES

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return index.float().view(-1, 1, 1, 1)


def run_in(folder: Path, task: Task = CLASSES, *overrides: str, **facts: Any) -> Run:
    splits: dict[str, DomainSplit] = {"source": Twelve(task), "target": Twelve(task)}
    dataset = DomainDataset("twelve", splits, task, ImageTransform((1, 1, 1)), class_names=(), fingerprint="12", **facts)
    config = load_config(CONFIG_FOLDER / "digits.yaml", [f"meta.support_size={SUPPORT}", *overrides])
    return Run(config=config, folder=RunFolder(folder), dataset=dataset, groups={4: 0, 7: 1}, device=torch.device("cpu"))


def evaluation(overall: Mapping[str, float], domains: Mapping[int, float], *, of: str = "accuracy") -> Evaluation:
    """One whose domains have the headline metric only."""
    values = {domain: {of: value} for domain, value in domains.items()}
    return Evaluation(overall, values, torch.zeros(12), selection_metric=next(iter(overall)), headline=of)


def cells(table: str) -> list[list[str]]:
    """Of each row but the rule; columns are two blanks or more apart."""
    lines = table.splitlines()
    assert set(lines[1]) == {"-", " "}
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in (lines[0], *lines[2:])]


# Tables


def test_overall_table_has_percent_of_the_reported_metrics_and_of_the_domains(tmp_path: Path) -> None:
    run = run_in(tmp_path, selection_metric="F1", reported={"F1": "macro F1", "acc": "mean accuracy"})
    plain = evaluation({"F1": 0.5, "acc": 0.25, "more": 0.9}, {4: 0.125, 7: 1.0})
    adapted = evaluation({"F1": 0.6789, "acc": 0.0, "more": 0.9}, {4: 0.5, 7: 0.75})
    assert cells(overall_table({"plain": plain, "adapted": adapted}, run.dataset)) == [
        ["macro F1", "mean accuracy", "mean accuracy of domains", "worst domain"],
        ["plain", "50.0", "25.0", "56.2", "12.5"],
        ["adapted", "67.9", "0.0", "62.5", "50.0"],
    ]


def test_overall_table_of_values_has_plain_numbers(tmp_path: Path) -> None:
    run = run_in(tmp_path, VALUES, selection_metric="r_wg", reported={"r_wg": "worst-group r", "r_all": "r"})
    found = evaluation({"r_wg": -0.1234, "r_all": 0.5}, {4: 0.25, 7: 0.75}, of="r")
    assert cells(overall_table({"adapted": found}, run.dataset)) == [
        ["worst-group r", "r", "mean r of domains", "worst domain"],
        ["adapted", "-0.123", "0.500", "0.500", "0.250"],
    ]


def test_what_is_not_a_number_is_a_dash(tmp_path: Path) -> None:
    run = run_in(tmp_path, VALUES, selection_metric="r_wg", reported={"r_wg": "worst-group r"})
    nothing = evaluation({"r_wg": math.nan}, {4: math.nan, 7: math.nan}, of="r")
    half = evaluation({"r_wg": math.inf}, {4: math.nan, 7: 0.5}, of="r")
    found = {"nothing": nothing, "half": half}
    assert cells(overall_table(found, run.dataset))[1:] == [["nothing", "-", "-", "-"], ["half", "-", "0.500", "0.500"]]
    assert cells(domain_table(found, NAMES))[1:] == [["north", "-", "-"], ["south", "-", "0.500"]]


def test_domain_table_has_a_row_a_domain_and_a_column_a_method() -> None:
    plain, adapted = evaluation({"accuracy": 0.5}, {4: 0.125, 7: 1.0}), evaluation({"accuracy": 0.5}, {4: 0.25, 7: 0.5})
    assert cells(domain_table({"plain": plain, "adapted": adapted}, NAMES)) == [
        ["domain", "plain", "adapted"],
        ["north", "12.5", "25.0"],
        ["south", "100.0", "50.0"],
    ]


def test_domain_table_of_values_has_plain_numbers_and_numbers_for_missing_names() -> None:
    found = evaluation({"r": 0.5}, {4: 0.125, 9: -1.0}, of="r")
    assert cells(domain_table({"adapted": found}, NAMES)) == [["domain", "adapted"], ["north", "0.125"], ["9", "-1.000"]]


def test_columns_stand_under_one_another() -> None:
    table = domain_table({"a long name of a method": evaluation({"accuracy": 0.5}, {4: 0.5})}, NAMES)
    head, rule, row = table.splitlines()
    assert len(head) == len(rule) == len(row)
    assert row.startswith("north") and row.endswith(" 50.0")


# Files of predictions


@pytest.mark.parametrize(
    ("facts", "split", "expected"),
    [
        ({"official_name": "camelyon17", "official_splits": SPLITS}, "target", "camelyon17_split:test_seed:6"),
        ({"official_name": "camelyon17", "official_splits": SPLITS}, "validation", "camelyon17_split:val_seed:6"),
        ({"official_name": "iwildcam", "official_splits": SPLITS}, "id_target", "iwildcam_split:id_test_seed:6"),
        (
            {"official_name": "poverty", "official_splits": SPLITS, "replicate": "fold:C"},
            "id_validation",
            "poverty_split:id_val_fold:C",
        ),
        ({}, "target", "twelve_split:target_seed:6"),
    ],
)
def test_file_of_predictions_has_the_name_that_the_leaderboard_looks_for(
    tmp_path: Path, facts: dict[str, Any], split: str, expected: str
) -> None:
    assert predictions_name(run_in(tmp_path, CLASSES, "seed=6", **facts), split) == f"{expected}_epoch:best_pred.csv"


def read_as_the_leaderboard_does(path: Path) -> list[Any]:
    """As ``get_predictions`` of the ``evaluate.py`` that WILDS judges submissions by."""
    return [ast.literal_eval(line.rstrip()) for line in path.read_text().splitlines() if line.rstrip()]


@pytest.mark.parametrize(
    "predictions", [torch.tensor([2, 0, 1181, 2]), torch.tensor([0.1, -1e-7, 3e8, 2.0])], ids=["classes", "values"]
)
def test_predictions_are_read_back_in_their_order(tmp_path: Path, predictions: Tensor) -> None:
    path = tmp_path / "predictions" / "adapted" / "all.csv"
    write_predictions(path, Evaluation({}, {}, predictions, "", ""))
    found = read_as_the_leaderboard_does(path)
    assert {type(value) for value in found} == {float if predictions.is_floating_point() else int}
    assert torch.equal(torch.tensor(found, dtype=predictions.dtype), predictions)
    assert len(path.read_text().splitlines()) == 4
    assert names(path.parent) == ["all.csv"]


# Rows of results


def strict(row: Mapping[str, Any]) -> Any:
    """What a reader without NaN gets."""
    return json.loads(json.dumps(row, allow_nan=False))


def test_result_row_says_what_was_tested_how_and_how_well(tmp_path: Path) -> None:
    run = run_in(tmp_path, CLASSES, "seed=6", selection_metric="F1", reported={"F1": "macro F1"})
    found = evaluation({"F1": 0.5, "acc": 0.25}, {4: 0.125, 7: 1.0})
    row = strict(result_row(run, "adapted", "target", found, weights={"meta": "abc"}, seconds=3))
    assert {"python", "torch", "numpy"} <= set(row["versions"])
    assert row["config"] == run.config.model_dump(mode="json")
    assert {key: value for key, value in row.items() if key not in ("config", "versions")} == {
        "method": "adapted",
        "dataset": "twelve",
        "split": "target",
        "seed": 6,
        "replicate": "seed:6",
        "metric": "F1",
        "reported": {"F1": "macro F1"},
        "unit": "fraction",
        "overall": {"F1": 0.5, "acc": 0.25},
        "mean": 0.5625,
        "worst": 0.125,
        "domains": {"north": {"accuracy": 0.125}, "south": {"accuracy": 1.0}},
        "support_size": SUPPORT,
        "score_support": True,
        "seconds": 3,
        "weights": {"meta": "abc"},
        "data": "12",
    }


def test_result_row_goes_by_the_fold_where_there_is_one(tmp_path: Path) -> None:
    run = run_in(tmp_path, CLASSES, "evaluation.support_size=5", "evaluation.score_support=false", replicate="fold:C")
    row = strict(result_row(run, "adapted", "target", evaluation({"accuracy": 1.0}, {}), weights={}))
    assert (row["replicate"], row["support_size"], row["score_support"]) == ("fold:C", 5, False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_result_row_is_json_for_every_reader_whatever_the_metrics_are(tmp_path: Path, value: float) -> None:
    run = run_in(tmp_path, VALUES, selection_metric="r_wg")
    row = strict(result_row(run, "adapted", "target", evaluation({"r_wg": value, "mse": 2.0}, {4: value}, of="r"), weights={}))
    assert row["unit"] == "value"
    assert row["overall"] == {"r_wg": None, "mse": 2.0}
    assert row["domains"] == {"north": {"r": None}}
    assert (row["mean"], row["worst"]) == (None, None)


# All of it


class Guess:
    """A student that predicts class ``offset`` + image number, or that value."""

    diagnosis = Diagnosis()

    def __init__(self, task: Task, offset: int = 0) -> None:
        self._task, self._offset = task, offset

    def logits(self, images: Tensor, **_: Any) -> Tensor:
        number = images.flatten() + self._offset
        if self._task.kind == "regression":
            return number.unsqueeze(1)
        return torch.nn.functional.one_hot(number.long() % 3, 3).float()


class Shifts:
    """An adapter that is right before adapting and wrong afterwards, but for a task of values, where both are right."""

    def __init__(self, task: Task) -> None:
        self.student, self._task = Guess(task), task

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        assert len(images) == SUPPORT
        return cast(Student, Guess(self._task, offset=1))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run without the time it takes."""

    def finished(run: Run) -> Trained:
        return Trained(adapter=cast(Adapter, Shifts(run.dataset.task)), plain=None, weights={"meta": "abc"})

    monkeypatch.setattr(testing, "_finished_run", finished)


@pytest.mark.usefixtures("trained")
def test_test_leaves_a_row_and_a_file_of_predictions_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path, official_name="dozen", official_splits=SPLITS)
    testing.test(run)
    rows = [json.loads(line) for line in run.folder.results.read_text().splitlines()]
    assert [(row["method"], row["overall"]["accuracy"]) for row in rows] == [("before adapting", 1.0), ("adapted", 0.0)]
    paths = [
        tmp_path / "predictions" / name / "dozen_split:test_seed:1_epoch:best_pred.csv" for name in ("before_adapting", "adapted")
    ]
    assert [read_as_the_leaderboard_does(path) for path in paths] == [[0, 1, 2] * 4, [1, 2, 0] * 4]
    said = capsys.readouterr().out
    assert f"target domains, adapted to {SUPPORT} unlabeled images of each, included in the score" in said
    assert ["before", "adapting", "100.0", "100.0", "100.0"] in [line.split() for line in said.splitlines()]
    assert ["north", "100.0", "0.0"] in [line.split() for line in said.splitlines()]


@pytest.mark.usefixtures("trained")
def test_test_of_values_writes_values(tmp_path: Path) -> None:
    run = run_in(tmp_path, VALUES)
    testing.test(run)
    (path,) = (tmp_path / "predictions" / "adapted").iterdir()
    assert read_as_the_leaderboard_does(path) == [float(number + 1) for number in range(12)]


@pytest.mark.usefixtures("trained")
def test_test_again_of_the_same_leaves_no_second_row(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    testing.test(run)
    before = run.folder.results.read_text()
    testing.test(run)
    assert run.folder.results.read_text() == before


@pytest.mark.usefixtures("trained")
def test_no_predictions_are_written_where_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path, unreadable=["one.png", "two.png"])
    testing.test(run)
    assert not (tmp_path / "predictions").exists()
    assert "2 images could not be read and are left out; no files of predictions are written" in capsys.readouterr().out
    assert len(run.folder.results.read_text().splitlines()) == 2


def say_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapting is watched, and the domain whose images are odd is suspect."""
    ranges = Ranges({"spread of predictions": Range(-1.0, 0.5)}, images=SUPPORT)

    def adapt(self: Shifts, images: Tensor, *, start: Student | None = None) -> Student:
        guess = Guess(self._task, offset=1)
        guess.diagnosis = ranges.judged({"spread of predictions": float(images[0]) % 2}, images=len(images))
        if guess.diagnosis.suspect:
            warnings.warn(SuspectAdaptation(str(guess.diagnosis)), stacklevel=2)
        return cast(Student, guess)

    monkeypatch.setattr(Shifts, "adapt", adapt)


@pytest.mark.filterwarnings("error::dmoe.SuspectAdaptation")
@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("on_suspect", ["keep", "warn"])
def test_suspect_domains_are_told_and_are_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_suspect: str
) -> None:
    say_suspect(monkeypatch)
    run = run_in(tmp_path, CLASSES, f"evaluation.on_suspect={on_suspect}")
    testing.test(run)
    rows = {row["method"]: row for row in map(json.loads, run.folder.results.read_text().splitlines())}
    why = "suspect: spread of predictions 1, training episodes -1 to 0.5"
    assert rows["adapted"]["suspect"] == {"south": why}
    assert "suspect" not in rows["before adapting"]
    said = capsys.readouterr().out.splitlines()
    assert "adapted: 1 of 2 domains suspect: south" in said
    assert (f"  south: {why}" in said) == (on_suspect == "warn")


@pytest.mark.usefixtures("trained")
def test_nothing_is_told_of_suspects_where_adapting_is_not_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path)
    testing.test(run)
    assert "suspect" not in capsys.readouterr().out
    assert not any("suspect" in json.loads(line) for line in run.folder.results.read_text().splitlines())


def test_unknown_split_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        testing.test(run_in(tmp_path), "id_target")
    assert one_line(caught) == "--split: twelve has no id_target split; it has source, target"
    assert names(tmp_path) == []
