"""One method of a comparison: settings chosen on validation domains, tests by every protocol, and what other seeds take over."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from told import one_line
from torch import Tensor, nn

from dmoe.compare.candidates import CANDIDATES, Candidate, Settings, Trial
from dmoe.compare.choice import choose
from dmoe.compare.comparison import write_results
from dmoe.compare.work import by_every_protocol, compare_one, protocols, read_rows
from dmoe.config import CONFIG_FOLDER, GMoEConfig, load_config
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.transforms import ImageTransform
from dmoe.errors import DoesNotApply, UserError
from dmoe.evaluation import Method
from dmoe.models.student import Student
from dmoe.run import Run
from dmoe.run_folder import RunFolder
from dmoe.tasks import Task

TASK = Task("multiclass", num_outputs=3)
NAMES = {4: "north", 7: "south"}
SUPPORT = 2


class Twelve(DomainSplit):
    """Image i is the number i, its class i modulo 3; even ones are of domain 4, odd ones of domain 7."""

    def __init__(self) -> None:
        number = torch.arange(12)
        self.labels, self.domains = number % 3, torch.where(number % 2 == 0, 4, 7)
        self.group_domains, self.domain_names = self.domains, NAMES

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return index.float().view(-1, 1, 1, 1)


class Shifted(nn.Module):
    """Says of image i the class (i + shift) modulo 3."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.nothing = shift, nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((images.flatten(1)[:, 0].long() + self.shift) % 3, 3).float()


class Shifting:
    """Adapts to the domain by counting how often it is asked to."""

    def __init__(self, shift: int) -> None:
        self.shift, self.calls = shift, 0

    def adapt(self, images: Tensor, *, start: Student | None = None) -> Student:
        self.calls += 1
        return Student(features=Shifted(self.shift), head=nn.Identity(), task=TASK)


def run_in(folder: Path, *overrides: str, seed: int = 1) -> Run:
    """A run of which the manifests of all stages are there."""
    splits: dict[str, DomainSplit] = {"source": Twelve(), "validation": Twelve(), "target": Twelve()}
    dataset = DomainDataset("twelve", splits, TASK, ImageTransform((1, 1, 1)), class_names=(), fingerprint="12")
    words = [f"meta.support_size={SUPPORT}", f"seed={seed}", "compare.support_sizes=[1,2,4]", "compare.stream_images=4", *overrides]
    config = load_config(CONFIG_FOLDER / "digits.yaml", words)
    run = Run(config=config, folder=RunFolder(folder), dataset=dataset, groups={4: 0, 7: 1}, device=torch.device("cpu"))
    for name, seconds in (
        ("experts/expert_00", 30.0),
        ("tokens/source", 10.0),
        ("aggregator", 5.0),
        ("student", 15.0),
        ("meta", 40.0),
    ):
        stage = run.folder.stage(name, {})
        stage.folder.mkdir(parents=True)
        stage.finish(files=[], figures={"cpu_seconds": seconds, "step": 150})
    return run


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """One that is right where its shift is 0; gives the settings that it was made with."""
    made: list[Settings] = []

    def make(trial: Trial, settings: Settings) -> Method:
        made.append({**settings, "name": trial.name})
        return cast(Method, Shifting(settings["shift"]))

    tried: Sequence[Settings] = [{"shift": 1}, {"shift": 0}, {"shift": 2}]
    monkeypatch.setitem(cast(dict[str, Candidate], CANDIDATES), "shifting", Candidate("shifting", "nobody, 2000", make, tried))
    return made


def test_settings_are_chosen_on_validation_and_tested_on_target(tmp_path: Path, candidate: list[Settings]) -> None:
    run = run_in(tmp_path / "seed_1")
    compare_one(run, "shifting", chosen_by=run.folder.path)
    rows = read_rows(tmp_path / "seed_1" / "compare" / "shifting")
    trials, tests = ([row for row in rows if row["kind"] == kind] for kind in ("trial", "test"))
    assert [(row["settings"], row["split"], row["score"]) for row in trials] == [
        ({"shift": 1}, "validation", 0.0),
        ({"shift": 0}, "validation", 1.0),
        ({"shift": 2}, "validation", 0.0),
    ]
    assert {row["settings"]["shift"] for row in tests} == {0}
    assert all(row["mean"] == row["worst"] == 1.0 and row["domains"] == {"north": 1.0, "south": 1.0} for row in tests)
    main = tests[0]
    assert (main["protocol"], main["support_size"], main["score_support"], main["predict"]) == (
        "per domain",
        SUPPORT,
        True,
        "after",
    )
    assert candidate[-1] == {"shift": 0, "name": "full"}


def test_no_more_are_tried_than_the_configuration_allows(tmp_path: Path, candidate: list[Settings]) -> None:
    run = run_in(tmp_path / "seed_1", "compare.trials=1")
    compare_one(run, "shifting", chosen_by=run.folder.path)
    assert [(one["shift"], one["name"]) for one in candidate] == [(1, "pace"), (1, "trial_0"), (1, "full")]


def test_other_seeds_take_over_what_the_first_one_chose(tmp_path: Path, candidate: list[Settings]) -> None:
    first, second = run_in(tmp_path / "seed_1"), run_in(tmp_path / "seed_2", seed=2)
    compare_one(first, "shifting", chosen_by=first.folder.path)
    candidate.clear()
    compare_one(second, "shifting", chosen_by=first.folder.path)
    assert candidate == [{"shift": 0, "name": "full"}]
    assert {row["kind"] for row in read_rows(tmp_path / "seed_2" / "compare" / "shifting")} == {"test"}


def test_another_seed_without_the_first_ones_choice_is_one_line(tmp_path: Path, candidate: list[Settings]) -> None:
    first, second = run_in(tmp_path / "seed_1"), run_in(tmp_path / "seed_2", seed=2)
    with pytest.raises(UserError, match="settings are not chosen yet") as error:
        compare_one(second, "shifting", chosen_by=first.folder.path)
    assert one_line(error)


def test_settings_are_taken_from_earlier_results(tmp_path: Path, candidate: list[Settings]) -> None:
    first, second = run_in(tmp_path / "seed_1"), run_in(tmp_path / "seed_2", seed=2)
    compare_one(first, "shifting", chosen_by=first.folder.path)
    write_results(tmp_path, [1])
    candidate.clear()
    compare_one(second, "shifting", chosen_by=tmp_path / "results.jsonl")
    assert candidate == [{"shift": 0, "name": "full"}]


def test_a_method_without_earlier_results_is_left_out(
    tmp_path: Path, candidate: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    run, results = run_in(tmp_path / "seed_1"), tmp_path / "results.jsonl"
    results.write_text(json.dumps({"method": "another", "kind": "test"}) + "\n")
    compare_one(run, "shifting", chosen_by=results)
    assert not candidate and "has no result of it" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", '{"method": "shifting", "kind": "test"}', "[]"])
def test_results_that_choose_nothing_are_one_line(tmp_path: Path, candidate: list[Settings], line: str) -> None:
    run, results = run_in(tmp_path / "seed_1"), tmp_path / "results.jsonl"
    results.write_text(line + "\n")
    with pytest.raises(UserError, match="leave out --chosen_by") as error:
        compare_one(run, "shifting", chosen_by=results)
    assert one_line(error)


def test_what_is_finished_is_not_done_again(tmp_path: Path, candidate: list[Settings]) -> None:
    run = run_in(tmp_path / "seed_1")
    compare_one(run, "shifting", chosen_by=run.folder.path)
    candidate.clear()
    compare_one(run, "shifting", chosen_by=run.folder.path)
    assert candidate == []


def test_a_method_that_does_not_apply_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(trial: Trial, settings: Settings) -> Method:
        raise DoesNotApply("none for this task")

    monkeypatch.setitem(cast(dict[str, Candidate], CANDIDATES), "none", Candidate("none", "", make))
    run = run_in(tmp_path / "seed_1")
    compare_one(run, "none", chosen_by=run.folder.path)
    assert read_rows(tmp_path / "seed_1" / "compare" / "none") == []
    assert "left out: none for this task" in capsys.readouterr().out


def test_layers_of_a_sparse_student_are_inputs_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path / "seed_1")
    for experts in (6, 4):
        made = Candidate("sparse", "", lambda trial, _: Shifting(0), sparse=GMoEConfig(experts=experts))
        monkeypatch.setitem(cast(dict[str, Candidate], CANDIDATES), "sparse", made)
        if experts == 6:
            compare_one(run, "sparse", chosen_by=run.folder.path)  # left out: the student is no transformer
        else:
            with pytest.raises(UserError, match="sparse"):
                compare_one(run, "sparse", chosen_by=run.folder.path)


def test_a_training_may_take_as_long_as_all_stages_together_less_what_it_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def make(trial: Trial, settings: Settings) -> Method:
        steps.append(trial.duration.steps(1))
        stage = trial.place(settings)
        if not stage.manifest.is_file():
            stage.folder.mkdir(parents=True)
            stage.finish(files=[], figures={"cpu_seconds": 0.5 * steps[-1], "step": steps[-1]})  # half a second a step
        return cast(Method, Shifting(0))

    made = Candidate("trained", "", make, [{"a": 0}, {"a": 1}], beside=["student"])
    monkeypatch.setitem(cast(dict[str, Candidate], CANDIDATES), "trained", made)
    run = run_in(tmp_path / "seed_1", "compare.trial_share=0.1")
    compare_one(run, "trained", chosen_by=run.folder.path)
    # 100 CPU seconds in all; a quarter of a tenth of it is 25 steps of the student, who took 0.1 seconds for each.
    assert steps == [25, 20, 20, 80, 80, round((100 - 15) / 0.5)]  # both go on to the second round
    (cost,) = {
        row["cost"]["training_cpu_seconds"] for row in read_rows(run.folder.path / "compare" / "trained") if row["kind"] == "test"
    }
    assert cost == pytest.approx(100)


def test_the_best_of_short_trainings_are_tried_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right most often after a short training is not after a longer one."""
    made: list[tuple[str, int]] = []
    right = {"trial_0": 2, "trial_1": 0, "trial_2": 1, "longer_trial_0": 1, "longer_trial_2": 2}

    def make(trial: Trial, settings: Settings) -> Method:
        made.append((trial.name, settings["a"]))
        stage = trial.place(settings)
        stage.folder.mkdir(parents=True)
        stage.finish(files=[], figures={"cpu_seconds": 1.0 + settings["a"], "step": 1})
        return cast(Method, Shifting(2 - right.get(trial.name, 0)))

    monkeypatch.setitem(cast(dict[str, Candidate], CANDIDATES), "two", Candidate("two", "", make, [{"a": a} for a in range(3)]))
    run = run_in(tmp_path)
    monkeypatch.setattr(type(run), "evaluate", lambda run, method, *_: SimpleNamespace(score=-method.shift))
    choice, tried = choose(Trial(run, run.folder.stage("compare/two", {})), CANDIDATES["two"], already=0)
    assert [name for name, _ in made] == ["pace", "trial_0", "trial_1", "trial_2", "longer_trial_0", "longer_trial_2"]
    assert choice.settings == {"a": 2}
    assert [one.steps for one in tried] == [tried[0].steps] * 3 + [4 * tried[0].steps] * 2
    assert choice.steps == round(100 * 4 * tried[0].steps / 3.0)  # by the pace of what was chosen


def test_protocols_beside_the_main_one(tmp_path: Path) -> None:
    found = list(map(str, protocols(run_in(tmp_path))))
    assert found == [
        "per domain, support 2, support not scored",
        "per domain, support 1",
        "per domain, support 4",
        "per domain, support 2, support from another domain",
        "per batch, support 2",
        "continual, support 2",
        "mixed stream, support 2",
        "label-skewed stream, support 2",
        "continual, support 2, predicted before the update",
    ]


def test_support_of_another_domain_is_never_its_own(tmp_path: Path) -> None:
    (swapped,) = [one.support_from for one in protocols(run_in(tmp_path)) if one.support_from]
    assert sorted(swapped) == sorted(swapped.values()) == [4, 7]
    assert all(domain != other for domain, other in swapped.items())


def test_what_treats_each_image_by_itself_predicts_once(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    once, always = Shifting(1), Shifting(1)
    candidate = Candidate("", "", lambda trial, settings: once, by_image=True)
    found = list(by_every_protocol(run, once, candidate))
    others = list(by_every_protocol(run, always, replace(candidate, by_image=False)))
    assert once.calls == len(NAMES) < always.calls
    assert [str(protocol) for protocol, _ in found] == [str(protocol) for protocol, _ in others]
    assert [evaluation.domains for _, evaluation in found] == [evaluation.domains for _, evaluation in others]


def test_results_of_all_seeds_are_in_the_order_of_methods_and_seeds(tmp_path: Path, candidate: list[Settings]) -> None:
    for seed in (1, 2):
        run = run_in(tmp_path / f"seed_{seed}", seed=seed)
        compare_one(run, "shifting", chosen_by=tmp_path / "seed_1")
    write_results(tmp_path, [2, 1])
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == sorted(row["seed"] for row in rows)
    assert {row["run"] for row in rows} == {"seed_1", "seed_2"}
