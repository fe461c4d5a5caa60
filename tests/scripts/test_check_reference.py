"""The reference check: it passes on what is shipped, and it can fail."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe.errors import UserError
from dmoe.meta.gradient import GradientMethod
from scripts.check_reference import Case, check_folder

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE = ROOT / "tests" / "reference"


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "check_reference.py"
    return subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)


def check_tampered(folder: Path, name: str, **changes: torch.Tensor | None) -> list[Case]:
    """Check a copy of one file in which tensors are replaced, or left out where None."""
    tensors = {**load_file(REFERENCE / f"{name}.safetensors"), **{key.replace("__", "."): t for key, t in changes.items()}}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / f"{name}.safetensors")
    return check_folder(folder)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return check_folder(REFERENCE)


def test_every_reference_tensor_is_reproduced(cases: list[Case]) -> None:
    assert [str(case) for case in cases if case.fault] == []


def test_every_file_is_a_case_and_meta_steps_are_one_a_method(cases: list[Case]) -> None:
    names = {path.stem for path in REFERENCE.glob("*.safetensors")}
    meta = {name for name in names if name.startswith("meta_")}
    expected = (names - meta) | {f"{name} ({method})" for name in meta for method in get_args(GradientMethod)}
    assert {case.name for case in cases} == expected


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("aggregator", "out.get_feat"),
        ("masking", "out.masked"),
        ("meta_step_multiclass", "out.grad.aggregator.transformer.layers.0.1.fn.net.0.weight"),
        ("meta_step_binary", "out.after_step.student.features.0.norm0.bias"),
        ("meta_two_epochs", "out.query_loss"),
        ("eval_multiclass", "out.d1.adapted.features.3.weight"),
    ],
)
def test_an_error_of_a_millionth_in_one_entry_is_found_and_named(tmp_path: Path, name: str, tensor: str) -> None:
    values = load_file(REFERENCE / f"{name}.safetensors")[tensor]
    values.view(-1)[-1] += 1e-6
    for case in check_tampered(tmp_path, name, **{tensor: values}):
        assert case.fault is not None
        assert tensor in case.fault
        assert case.error == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("tensor", "named"), [("out.get_feat", "out.get_feat"), ("x", "x is not"), ("aggregator.mlp.0.bias", "head.0.bias")]
)
def test_a_missing_tensor_is_a_failure(tmp_path: Path, tensor: str, named: str) -> None:
    (case,) = check_tampered(tmp_path, "aggregator", **{tensor: None})
    assert named in (case.fault or "")


def test_an_output_that_nothing_computes_is_a_failure(tmp_path: Path) -> None:
    (case,) = check_tampered(tmp_path, "masking", out__more=torch.zeros(1))
    assert "out.more" in (case.fault or "")


def test_an_output_that_is_not_a_number_is_a_failure(tmp_path: Path) -> None:
    expected = load_file(REFERENCE / "aggregator.safetensors")["out.get_feat"] * torch.nan
    (case,) = check_tampered(tmp_path, "aggregator", out__get_feat=expected)
    assert "out.get_feat" in (case.fault or "")


def test_a_file_of_unknown_kind_is_a_failure(tmp_path: Path) -> None:
    shutil.copy(REFERENCE / "masking.safetensors", tmp_path / "surprise.safetensors")
    (case,) = check_folder(tmp_path)
    assert case.name == "surprise"
    assert case.fault is not None


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all"])
def test_a_folder_without_whole_files_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "masking.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        check_folder(tmp_path)


def test_the_script_leaves_with_0_when_all_holds(tmp_path: Path) -> None:
    shutil.copy(REFERENCE / "masking.safetensors", tmp_path)
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["masking", "0.0e+00", "ok"]


def test_the_script_leaves_with_1_when_a_tensor_is_off(tmp_path: Path) -> None:
    masked = load_file(REFERENCE / "masking.safetensors")["out.masked"]
    check_tampered(tmp_path, "masking", out__masked=masked + 1e-6)
    done = run(tmp_path)
    assert done.returncode == 1
    assert "FAILED: out.masked" in done.stdout


def test_the_script_leaves_with_2_and_one_line_for_a_missing_folder(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path / 'nowhere'}: no such folder\n"
