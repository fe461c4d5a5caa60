"""One network trained alone: what is refused before it starts, what is left of it, and that it predicts."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import run_in, steady_run_in
from runs import forget, kill_at, rows, start, weights
from told import names, one_line

import dmoe
from dmoe import testing
from dmoe.alone import check_alone, train_alone, trained_alone
from dmoe.config import Config, load_config
from dmoe.errors import UserError
from dmoe.plan import Costs, entries_alone, show
from dmoe.run import Run
from dmoe.stages import pretrain_student

ROOT = Path(__file__).resolve().parent.parent
ALONE = ["method=erm", "experts.count=30"]
"""More experts than domains: there are none."""


def alone_in(folder: Path, *overrides: str) -> Run:
    run = steady_run_in(folder, *ALONE, *overrides)
    return replace(run, groups={})


def test_it_is_the_student_of_a_whole_run(tmp_path: Path) -> None:
    alone, whole = alone_in(tmp_path / "alone"), steady_run_in(tmp_path / "whole")
    train_alone(alone)
    expected = pretrain_student(whole)
    assert alone.student_stage.inputs == whole.student_stage.inputs
    (method,) = trained_alone(alone).values()
    images = torch.rand(8, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(method.adapt(images).logits(images), expected.eval()(images))
    assert names(alone.folder.path / "student") and not (alone.folder.path / "experts").exists()


@pytest.mark.parametrize(("objective", "name"), [("erm", "ERM"), ("group_dro", "GroupDRO"), ("swad", "SWAD")])
def test_its_test_is_one_row_by_the_name_of_what_it_minimised(
    tmp_path: Path, objective: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = alone_in(tmp_path, f"student.objective.name={objective}", "student.training.batch_size=24")
    run.folder.claim(run.config)
    train_alone(run)
    for _ in range(2):
        testing.test(run)
    told = capsys.readouterr().out
    assert "target domains, unadapted" in told and "suspect" not in told
    (row,) = rows(tmp_path)
    assert (row["method"], row["split"], len(row["domains"])) == (name, "target", 5)
    (student,) = (one.adapt(torch.empty(0)) for one in trained_alone(run).values())
    split = run.dataset.splits["target"]
    right = student.predict(split.images(torch.arange(50))).argmax(dim=1) == split.labels
    assert row["overall"]["accuracy"] == pytest.approx(right.float().mean().item())
    assert row["weights"] == run.student_stage.files()


def test_it_is_opened_as_what_it_is(tmp_path: Path) -> None:
    run = alone_in(tmp_path)
    run.folder.claim(run.config)
    train_alone(run)
    model, images = dmoe.load_single(tmp_path), torch.rand(8, 1, 4, 4)
    (method,) = trained_alone(run).values()
    torch.testing.assert_close(model.predict(images), method.adapt(images).predict(images))  # in another layout
    assert model.transform.image_shape == (1, 4, 4)
    with pytest.raises(UserError, match=r"trained alone .*, which does not adapt: dmoe\.load_single opens it") as error:
        dmoe.load(tmp_path)
    assert one_line(error)


def test_a_whole_run_is_not_taken_for_one(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.folder.claim(run.config)
    with pytest.raises(UserError, match=r"a run of all stages, not of one network alone: dmoe\.load opens it"):
        dmoe.load_single(tmp_path)


def test_a_run_that_is_not_finished_is_told(tmp_path: Path) -> None:
    run = alone_in(tmp_path)
    run.folder.claim(run.config)
    with pytest.raises(UserError, match="the run is not finished"):
        dmoe.load_single(tmp_path)
    with pytest.raises(UserError, match=r"student: the network is not trained yet: python run\.py --run_dir"):
        trained_alone(run)


@pytest.mark.parametrize(
    ("changes", "asked", "told"),
    [
        ({}, {"expert": 0}, "there are no experts to train"),
        ({"given": {"experts"}}, {}, "there are no experts and no aggregator to load"),
        ({"given": {"aggregator"}}, {}, "there are no experts and no aggregator to load"),
        ({"given": {"student"}}, {}, "no finished student here"),
    ],
    ids=["one expert", "load experts", "load aggregator", "load student"],
)
def test_what_has_no_place_in_it_is_told(tmp_path: Path, changes: Mapping[str, Any], asked: Mapping[str, int], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        check_alone(replace(alone_in(tmp_path), **changes), **asked)  # type: ignore[arg-type]
    assert one_line(error)


def test_an_objective_that_does_not_fit_is_told_before_anything_starts(tmp_path: Path) -> None:
    run = alone_in(tmp_path, "student.objective.name=coral", "student.training.batch_size=7")
    with pytest.raises(UserError, match=r"student: objective coral: batch_size: must be at least 8") as error:
        check_alone(run)
    assert one_line(error)


def test_a_whole_run_and_one_network_do_not_share_a_folder(tmp_path: Path) -> None:
    run_in(tmp_path).folder.claim(run_in(tmp_path).config)
    with pytest.raises(UserError, match="method: meta_dmoe there, erm here"):
        run_in(tmp_path, "method=erm").folder.claim(run_in(tmp_path, "method=erm").config)


def test_plan_has_the_training_and_the_test(tmp_path: Path) -> None:
    """7 steps of 25 images and 3 looks at 30 of validation, see noise.py; 50 images of the test."""
    costs = Costs(read=0, forward=1, train=10)
    found = {entry.stage: entry.seconds for entry in entries_alone(alone_in(tmp_path), costs)}
    assert found == {"student": 7 * 25 * 10 + 3 * 30, "test": 50}


def test_plan_says_what_is_trained_until_it_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = alone_in(tmp_path, "student.objective.name=mmd", "student.training.batch_size=24")
    show(run)
    told = capsys.readouterr().out
    assert "one network small_conv" in told and "trained by MMD, tested unadapted" in told
    assert not any(word in told for word in ("experts", "aggregator", "tokens", "meta"))
    train_alone(run)
    show(run)
    assert "every stage is finished" in capsys.readouterr().out


def test_old_runs_are_of_all_stages() -> None:
    config = load_config(ROOT / "configs" / "digits.yaml")
    assert config.method == "meta_dmoe" and not config.trains_one
    plain = config.model_dump(mode="json")
    del plain["method"]
    assert Config.model_validate(plain) == config


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--load_trained_experts"], "there are no experts and no aggregator to load"),
        (["--compare"], "--compare: it makes whole runs: method must be meta_dmoe"),
        (["student.training.batch_size=3", "student.objective.name=irm"], "student: objective irm: batch_size"),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(tmp_path: Path, words: list[str], told: str) -> None:
    done = _run("run.py", "--method", "erm", "--run_dir", str(tmp_path / "out"), "--gpu", "-1", "--threads", "1", *words)
    assert done.returncode == 2
    assert told in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_cut_off_it_ends_in_the_same_network_and_is_tested_again(tmp_path: Path) -> None:
    words = ["--method", "erm", "checkpoint_every=5", "data.source_images_per_domain=150", "student.training.duration=40 steps"]
    one, other = tmp_path / "one", tmp_path / "other"
    out, err = (process := start("run.py", one, *words)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert "one network small_conv" in out
    kill_at(start("run.py", other, *words), other / "student", 10)
    assert start("run.py", other, *words).wait(timeout=300) == 0
    assert weights(one) == weights(other) and list(weights(one)) == ["student/weights.safetensors"]
    (row,) = rows(one)
    forget(one, "results.jsonl")
    assert start("run.py", one, "--test").wait(timeout=300) == 0
    assert json.dumps(rows(one)) == json.dumps([row])
    assert start("run.py", one, "--test", "--split", "validation").wait(timeout=300) == 0
    assert [each["split"] for each in rows(one)] == ["target", "validation"]
