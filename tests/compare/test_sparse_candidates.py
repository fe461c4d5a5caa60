"""Sparse students in a comparison: trained plainly, and meta-trained beside the run's own experts."""

from pathlib import Path

import pytest
import torch
from noise import steady_run_in, train

from dmoe.adaptation import Adapter
from dmoe.compare.candidates import CANDIDATES, FULL, Trial
from dmoe.config import Duration
from dmoe.errors import DoesNotApply
from dmoe.models.sparse import SplitFFN, sparse_layers
from dmoe.models.student import Student
from dmoe.run import Run

VIT = "student.backbone={name: small_vit}"


def trial_of(run: Run, key: str, steps: int = 2) -> Trial:
    seen = CANDIDATES[key].seen(run)
    return Trial(seen, seen.folder.stage(f"compare/{key}", {}), name=FULL, duration=Duration(steps, "steps"))


def is_emoe(student: Student) -> bool:
    layers = sparse_layers(student.features)
    assert layers
    return all(isinstance(layer, SplitFFN) for layer in layers.values())


@pytest.mark.parametrize("key", ["gmoe", "emoe"])
def test_a_sparse_student_is_trained_plainly(tmp_path: Path, key: str) -> None:
    run = steady_run_in(tmp_path, VIT)
    trial = trial_of(run, key)
    method = CANDIDATES[key].make(trial, {"lr": 1e-3})
    student = method.adapt(run.source.images(torch.arange(4)))
    assert is_emoe(student) == (key == "emoe")
    assert trial.training_seconds is not None
    assert not sparse_layers(run.network(run.config.student_backbone, to_train=False).features), "the run's own stays dense"


@pytest.mark.parametrize("key", ["gmoe", "meta_dmoe_emoe"])
def test_other_networks_have_no_sparse_students(tmp_path: Path, key: str) -> None:
    with pytest.raises(DoesNotApply, match="transformer"):
        trial_of(steady_run_in(tmp_path), key)


@pytest.mark.parametrize("key", ["meta_dmoe_gmoe", "meta_dmoe_emoe"])
def test_a_sparse_student_is_meta_trained_beside_the_runs_own_experts(tmp_path: Path, key: str) -> None:
    run = steady_run_in(tmp_path, VIT)
    train(run)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    trial = trial_of(run, key)
    method = CANDIDATES[key].make(trial, {})
    assert isinstance(method, Adapter)
    assert is_emoe(method.student) == (key == "meta_dmoe_emoe")
    seconds = [trial.run.folder.stage(f"compare/{key}/{name}", {}).manifest for name in (FULL, f"{FULL}/student")]
    assert all(manifest.is_file() for manifest in seconds)
    images = run.source.images(torch.arange(8))
    moved, again = method.adapt(images), CANDIDATES[key].make(trial, {}).adapt(images)
    torch.testing.assert_close(moved.logits(images), again.logits(images))
    assert not torch.equal(moved.logits(images), method.student.logits(images))
    assert all(path.read_bytes() == content for path, content in kept.items())
