"""The student's pretraining by each objective of the configuration."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from noise import run_in, steady_run_in
from told import one_line

from dmoe.artifacts import load_tensors
from dmoe.config import ObjectiveConfig
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.run import Run
from dmoe.stages import check, pretrain_student
from experts.training import train_expert

NAMES = [each.model_fields["name"].default for each in get_args(get_args(ObjectiveConfig)[0])]
FEW = ["student.training.batch_size=24"]


def named(name: str) -> list[str]:
    return [*FEW, f"student.objective.name={name}"]


def weights(run: Run) -> dict[str, torch.Tensor]:
    pretrain_student(run)
    return {name: value for name, value in load_tensors(run.student_stage.weights)[0].items() if name.startswith("model.")}


def test_all_objectives_are_known_by_name() -> None:
    assert NAMES == ["erm", "coral", "irm", "mmd", "dann", "fish", "fishr", "group_dro", "miro", "swad"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_it_trains_the_student_and_a_finished_one_is_taken(tmp_path: Path, name: str, kind: str) -> None:
    run = run_in(tmp_path, *named(name), kind=kind)  # type: ignore[arg-type]
    student = pretrain_student(run)
    assert all(value.isfinite().all() for value in student.state_dict().values())
    manifest = run.student_stage.manifest.stat().st_mtime_ns
    again = pretrain_student(run_in(tmp_path, *named(name), kind=kind))  # type: ignore[arg-type]
    assert run.student_stage.manifest.stat().st_mtime_ns == manifest
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_and_resumed_is_bit_equal(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = [*named(name), "checkpoint_every=2"]
    expected = weights(steady_run_in(tmp_path / "undisturbed", *change))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
        patch.setattr(DomainSplit, "finish", _cut_off_after(5, DomainSplit.finish))
        pretrain_student(steady_run_in(tmp_path / "cut", *change))
    torch.manual_seed(12345)
    resumed = weights(steady_run_in(tmp_path / "cut", *change))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in expected.items())


def test_without_an_objective_it_is_erm_from_the_same_inputs(tmp_path: Path) -> None:
    ours, plain = steady_run_in(tmp_path / "ours", *named("erm")), steady_run_in(tmp_path / "plain", *FEW)
    assert ours.student_stage.inputs == plain.student_stage.inputs
    one, other = weights(ours), weights(plain)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert run_in(tmp_path, *named("mmd")).student_stage.inputs != plain.student_stage.inputs


def test_experts_are_trained_by_an_objective_of_theirs(tmp_path: Path) -> None:
    found = {}
    for name in ("erm", "group_dro"):
        run = steady_run_in(tmp_path / name, f"experts.objective.name={name}")
        train_expert(run, 0)
        found[name] = load_tensors(run.expert_stage(0).weights)[0]["model.head.weight"]
    assert not torch.equal(found["erm"], found["group_dro"])
    plain, named_erm = steady_run_in(tmp_path), steady_run_in(tmp_path, "experts.objective.name=erm")
    assert named_erm.expert_stage(0).inputs == plain.expert_stage(0).inputs != run.expert_stage(0).inputs


def test_expert_of_one_domain_cannot_compare_any_and_that_is_told_at_the_start(tmp_path: Path) -> None:
    run = replace(run_in(tmp_path, "experts.objective.name=coral"), groups={0: 0, 1: 0, 2: 0, 3: 0, 4: 1})
    with pytest.raises(UserError, match=r"experts \(number 1\): objective coral: domains: .* there is one only") as error:
        check(run)
    assert one_line(error)
    check(replace(run, config=run_in(tmp_path).config))


def _cut_off_after(count: int, finish):  # type: ignore[no-untyped-def]
    left = iter(range(count))

    def cut(split: DomainSplit, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[0] < 30 and next(left, None) is None:  # validation images are thirty
            raise RuntimeError("cut off")
        finished: torch.Tensor = finish(split, pixels)
        return finished

    return cut
