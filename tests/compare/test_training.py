"""Trainings of what is compared with: each learns on the digits, and is taken when it is finished."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from noise import run_in, steady_run_in

from dmoe.compare import training as trainings
from dmoe.compare.candidates import CANDIDATES, FULL, IN_STEPS, OF_THE_OPTIMIZER, Trial
from dmoe.compare.training import (
    told_run,
    train_arm_bn,
    train_arm_cml,
    train_arm_ll,
    train_oracle,
    train_plainly,
)
from dmoe.config import Duration, TrainingConfig, objective_of
from dmoe.data import digits
from dmoe.errors import DoesNotApply, UserError
from dmoe.evaluation import Method
from dmoe.models.networks import Network
from dmoe.objectives import NAMES
from dmoe.protocols import Protocol
from dmoe.run import Run
from dmoe.run_folder import RunFolder
from dmoe.stages import pretrain_student

OBJECTIVES = tuple(NAMES)
KINDS = (*OBJECTIVES, "oracle", "ARM-CML", "ARM-BN", "ARM-LL")
FIELDS = {
    "coral": {"penalty": 0.1, "domains": 3},
    "irm": {"penalty": 1.0, "anneal_steps": 50, "domains": 3},
    "mmd": {"penalty": 0.1},
    "dann": {"penalty": 0.1},
    "fishr": {"penalty": 10.0, "anneal_steps": 50},
}
"""Of objectives, for trainings of a few dozen steps."""

SHORT = TrainingConfig.model_validate({"batch_size": 12, "duration": "4 steps", "optimizer": {"lr": 0.01}})


def train(run: Run, kind: str, training: TrainingConfig, *, pretrained: Network | None = None) -> Method:
    how = {"run": run, "stage": run.folder.stage(kind, run.facts()), "training": training}
    in_episodes = {"domains": 2, "pretrained": pretrained}
    by_kind: dict[str, Callable[[], Method]] = {
        **{name: partial(train_plainly, **how, objective=objective_of(name, FIELDS.get(name, {}))) for name in OBJECTIVES},
        "oracle": lambda: train_oracle(**how),
        "ARM-CML": lambda: train_arm_cml(**how, **in_episodes, context_channels=2, context_width=4, kernel_size=3),
        "ARM-BN": lambda: train_arm_bn(**how, **in_episodes),
        "ARM-LL": lambda: train_arm_ll(**how, domains=2, inner_lr=0.1, loss_width=8, pretrained=pretrained or student_of(run)),
    }
    return by_kind[kind]()


def student_of(run: Run) -> Network:
    """With running statistics of its own."""
    student = run.network(run.config.student_backbone, "any", to_train=True)
    with torch.no_grad():
        student.train()(run.source.images(torch.arange(len(run.source))))
    return student.eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "oracle"])
def test_finished_training_is_taken_and_says_the_same(tmp_path: Path, kind: str) -> None:
    run, images = run_in(tmp_path), torch.rand(8, 1, 4, 4)
    trained = train(run, kind, SHORT).adapt(images)
    manifest = run.folder.stage(kind, {}).manifest.stat()
    again = train(run_in(tmp_path), kind, SHORT).adapt(images)
    assert run.folder.stage(kind, {}).manifest.stat().st_mtime_ns == manifest.st_mtime_ns
    assert torch.equal(again.logits(images), trained.logits(images))


@pytest.mark.parametrize("kind", ["ARM-CML", "ARM-BN", "ARM-LL"])
def test_arm_begins_as_the_pretrained_student(tmp_path: Path, kind: str) -> None:
    run, images = run_in(tmp_path), torch.rand(8, 1, 4, 4)
    student = student_of(run)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    none = SHORT.model_copy(update={"duration": SHORT.duration.parse("0 steps")})
    begun = train(run, kind, none, pretrained=student)
    if kind == "ARM-CML":  # the context counts for nothing yet
        with torch.no_grad():
            torch.testing.assert_close(begun.adapt(torch.rand(8, 1, 4, 4)).logits(images), student(images))
    network = begun.network  # type: ignore[attr-defined]
    for name, value in network.state_dict().items():
        assert torch.equal(value[:, :1] if name == "features.0.weight" else value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("key", OBJECTIVES)
def test_settings_of_objectives_are_what_they_are_trained_by(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six each, the objective's own field for field, but for the optimizer's and parts of the training."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(trainings, "train_plainly", lambda run, stage, **how: seen.append(how))
    run = run_in(tmp_path, "student.backbone={name: small_conv, weights: pretrained}")
    trial = Trial(run, run.folder.stage(key, {}), name=FULL, duration=Duration(200, "steps"))
    tried = CANDIDATES[key].tried
    assert len(tried) == 6 and len({str(settings) for settings in tried}) == 6
    for settings in tried:
        CANDIDATES[key].make(trial, settings)
        objective, training = seen[-1]["objective"], seen[-1]["training"]
        assert objective.name == key
        for name, value in settings.items():
            if name in OF_THE_OPTIMIZER:
                assert getattr(training.optimizer, name) == value
            elif name in IN_STEPS:
                assert getattr(objective, IN_STEPS[name]) == round(200 * value)
            else:
                assert getattr(objective, name) == value
        assert training.duration == trial.duration
        assert training.evaluate_every == Duration(100 if key == "swad" else 50, "steps")


@pytest.mark.parametrize(("name", "steps"), [("trial_0", 50), (FULL, 400)])
def test_a_training_is_the_students_own_shorter_or_longer_as_a_whole(tmp_path: Path, name: str, steps: int) -> None:
    run = run_in(tmp_path, "student.training.duration=200 steps", "student.training.optimizer.warmup=20 steps")
    trial = Trial(run, run.folder.stage("erm", {}), name=name, duration=Duration(steps, "steps"))
    made = trial.training({"lr": 0.5})
    assert (str(made.duration), str(made.optimizer.warmup)) == (f"{steps} steps", f"{steps // 10} steps")
    assert made.optimizer.lr == 0.5 and made.optimizer.schedule == run.config.student.training.optimizer.schedule


def test_first_settings_are_the_published_ones() -> None:
    """Defaults of DomainBed's registry, and of the papers of MIRO and SWAD."""
    first = {key: CANDIDATES[key].tried[0] for key in OBJECTIVES}
    assert first["mmd"]["penalty"] == first["coral"]["penalty"] == first["dann"]["penalty"] == 1.0
    assert (first["irm"]["penalty"], first["irm"]["annealed"]) == (100, 0.1)
    assert (first["fishr"]["penalty"], first["fishr"]["annealed"], first["fishr"]["ema"]) == (1000, 0.3, 0.95)
    assert first["group_dro"]["weights_lr"] == 0.01
    assert first["miro"] == {"penalty": 0.1}
    assert first["swad"] == {"start_patience": 3, "end_patience": 6, "tolerance": 1.3}


def test_miro_is_none_for_a_student_without_pretrained_weights(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    trial = Trial(run, run.folder.stage("miro", {}), name=FULL, duration=Duration(2, "steps"))
    with pytest.raises(DoesNotApply, match="has no pretrained ones to stay near to"):
        CANDIDATES["miro"].make(trial, {"penalty": 0.1})


def test_miro_stays_near_to_the_student_where_nothing_else_is_pretrained(tmp_path: Path) -> None:
    run = steady_run_in(tmp_path)
    pretrained, images = pretrain_student(run).eval(), run.source.images(torch.arange(16))

    def moved(penalty: float, steps: int = 60) -> float:
        trial = Trial(run, run.folder.stage(f"{penalty}, {steps}", {}), name=FULL, duration=Duration(steps, "steps"))
        student = CANDIDATES["miro_of_student"].make(trial, {"penalty": penalty}).adapt(images)
        return float((student.features(images) - pretrained.features(images)).square().mean().detach())

    assert moved(1.0, steps=0) == 0
    assert moved(10.0) < moved(1e-6) / 2


def test_miro_leaves_the_student_where_weights_are_pretrained(tmp_path: Path) -> None:
    run = run_in(tmp_path, "student.backbone={name: resnet18, weights: pretrained}")
    trial = Trial(run, run.folder.stage("miro", {}), name=FULL, duration=Duration(2, "steps"))
    with pytest.raises(DoesNotApply, match="begins with pretrained weights, and stays near to those"):
        CANDIDATES["miro_of_student"].make(trial, {"penalty": 0.1})


def test_oracle_needs_numbers_that_describe_domains(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no numbers are known"):
        told_run(run_in(tmp_path))


@pytest.mark.parametrize("kind", ["ARM-BN", "ARM-CML"])
@pytest.mark.parametrize("task", ["binary", "regression"])
def test_one_output_is_trained_too(tmp_path: Path, kind: str, task: str) -> None:
    run = run_in(tmp_path, kind=task)  # type: ignore[arg-type]
    images = torch.rand(8, 1, 4, 4)
    assert train(run, kind, SHORT).adapt(images).logits(images).shape == (8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_digits(tmp_path: Path, kind: str) -> None:
    """Better than one in five, where one in ten is chance."""
    run = run_in(tmp_path, "meta.support_size=24")
    run = replace(run, dataset=digits.load().with_fewer_source_images(300), folder=RunFolder(tmp_path))
    run = told_run(run) if kind == "oracle" else run
    optimizer = {"lr": 0.003, "schedule": "cosine", "warmup": "20 steps"}
    training = TrainingConfig.model_validate({"batch_size": 48, "duration": "100 steps", "optimizer": optimizer})
    method = train(run, kind, training)
    assert run.evaluate(method, "validation", Protocol(24)).score > 0.2
