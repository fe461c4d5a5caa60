"""Weights that somebody made to do harm: nothing in them runs, nothing is taken that does not fit, and memory stays bounded."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damages import CUT, FLIPPED, KINDS
from doors import again, changes, loaded, refusal, state

from dmoe.artifacts import load_tensors, save_tensors
from dmoe.models.networks import build_network
from dmoe.published import PublishedFolder, read_domain_split

NAME = "iwildcam_2experts_seed1_0_exp_best.pth"


class Program:
    """What a pickle can hold: it makes a file when it is opened by who runs it."""

    def __init__(self, canary: Path, call: Callable[..., Any]) -> None:
        self._canary, self._call = canary, call

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {os.system: f"touch {self._canary}", exec: f"open({str(self._canary)!r}, 'w')", open: str(self._canary)}
        return self._call, (arguments[self._call], "w") if self._call is open else (arguments[self._call],)


def _published(folder: Path) -> PublishedFolder:
    return PublishedFolder(folder, dataset="iwildcam", experts=2, seed=1)


def _pickled(thing: object, how: str) -> bytes:
    content = io.BytesIO()
    match how:
        case "torch":
            torch.save(thing, content)
        case "old torch":
            torch.save(thing, content, _use_new_zipfile_serialization=False)
        case _:
            content.write(pickle.dumps(thing, protocol=int(how)))
    return content.getvalue()


PROGRAMS = [(call, how) for call in (os.system, exec, open) for how in ("torch", "old torch", "0", "2", "4")]


@pytest.mark.parametrize(("call", "how"), PROGRAMS, ids=[f"{call.__name__}, {how}" for call, how in PROGRAMS])
@pytest.mark.parametrize("name", [NAME, "domain_split.pkl"])
def test_no_program_in_a_pickle_runs(call: Callable[..., Any], how: str, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / NAME).touch()
    (tmp_path / name).write_bytes(_pickled({"fc.weight": Program(canary, call)}, how))
    before = state(tmp_path)
    told = refusal(lambda: _published(tmp_path).expert(0) if name == NAME else read_domain_split(tmp_path / name))
    assert told is not None and told.startswith(f"{tmp_path / name}: ")
    assert changes(before, state(tmp_path)) == set()
    assert not canary.exists()


def _zip_of(path: Path, packed: int) -> None:
    """A state dict whose archive is packed as zip files mostly are: a gigabyte of nothing takes a megabyte."""
    torch.save({"fc.weight": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as plain:
        entries = [(entry.filename, plain.read(entry)) for entry in plain.infolist()]
    with zipfile.ZipFile(path, "w", packed) as archive:
        for entry, content in entries:
            archive.writestr(entry, content)


def _stretched(path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


def _deep(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


def _sized(path: Path) -> None:
    """Asks for as many bytes as there are nowhere."""
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 1 << 45) + b"\x85R.")


def _of_python(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


STATE_DICTS: dict[str, Callable[[Path], object]] = {
    **{**CUT, **FLIPPED, **KINDS},
    "packed": lambda path: _zip_of(path, zipfile.ZIP_DEFLATED),
    "stretched": _stretched,
    "deep": _deep,
    "sized": _sized,
    "a list": _of_python([torch.zeros(1)]),
    "a number": _of_python(3),
    "other values": _of_python({"fc.weight": 3}),
    "other keys": _of_python({3: torch.zeros(1)}),
    "control characters": _of_python({"a\n\x1b[31m": torch.zeros(1)}),
    "sparse": _of_python({"fc.weight": torch.eye(3).to_sparse()}),
    "meta": _of_python({"fc.weight": torch.zeros(3, device="meta")}),
    "nested": _of_python({"fc": {"weight": torch.zeros(3)}}),
    "complex": _of_python({"fc.weight": torch.zeros(3, dtype=torch.complex64)}),
    "an archive of something else": lambda path: zipfile.ZipFile(path, "w").writestr("x", "y"),
}


@pytest.mark.parametrize("how", list(STATE_DICTS))
def test_bad_state_dict_is_told(how: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    torch.save({"conv1.weight": torch.randn(4, 3, 3, 3), "layer1.0.bias": torch.zeros(300)}, path)
    STATE_DICTS[how](path)
    before = state(tmp_path)
    network = build_network("resnet18", image_shape=(3, 32, 32), num_outputs=2)
    told = refusal(lambda: _published(tmp_path).load_expert(0, network))
    assert (told is not None and str(path) in told) or how == "a link to itself"
    assert changes(before, state(tmp_path)) == set()


def _head(claims: object, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(**claims: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **claims}}


def _about(**about: object) -> dict[str, object]:
    return {**_one(), "__metadata__": {"dmoe": json.dumps(about)}}


SAFETENSORS: dict[str, bytes] = {
    "head of 2^63 bytes": _head({}, length=1 << 63),
    "head of 2^40 bytes": _head({}, length=1 << 40),
    "head is no JSON": _head(b"{" * 100),
    "head is deep": _head(b"[" * 100_000),
    "shape of 2^40": _head(_one(shape=[1 << 40])),
    "shape of 2^64": _head(_one(shape=[1 << 64])),
    "shape overflows": _head(_one(shape=[1 << 32, 1 << 32, 1 << 32])),
    "negative shape": _head(_one(shape=[-1])),
    "many dimensions": _head(_one(shape=[1] * 1000 + [16])),
    "offsets beyond the end": _head(_one(shape=[1 << 20], data_offsets=[0, 1 << 22])),
    "offsets backwards": _head(_one(data_offsets=[64, 0])),
    "offsets overlap": _head({**_one(), "b": _one()["a"]}),
    "unknown type": _head(_one(dtype="F99")),
    "type of four bits": _head(_one(dtype="F4", shape=[128])),
    "type of six bits": _head(_one(dtype="F6_E2M3", shape=[16], data_offsets=[0, 12]), b"\0" * 12),
    "type of eight bits": _head(_one(dtype="F8_E8M0", shape=[64])),
    "no tensors": _head({}, b""),
    "name with control characters": _head({"a\n\x1b[31m": _one()["a"]}),
    "facts no JSON": _head({**_one(), "__metadata__": {"dmoe": "{"}}),
    "facts deep": _head({**_one(), "__metadata__": {"dmoe": "[" * 100_000}}),
    "facts a list": _head({**_one(), "__metadata__": {"dmoe": "[]"}}),
    "facts a number": _head({**_one(), "__metadata__": {"dmoe": "1e400"}}),
    "no facts": _head(_about()),
    "facts of another kind": _head(_about(facts=[1])),
    "wrong sum": _head(_about(facts={}, sha256="0")),
    "sum of another kind": _head(_about(facts={}, sha256=[{}])),
    "metadata nested": _head({**_one(), "__metadata__": {"dmoe": {"a": 1}}}),
}


@pytest.mark.parametrize("how", list(SAFETENSORS))
def test_bad_safetensors_are_told_or_plain_tensors(how: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(SAFETENSORS[how])
    told = refusal(lambda: load_tensors(path))
    assert told is None or told.startswith(f"{path}: ")


@pytest.mark.parametrize("how", list(SAFETENSORS))
def test_weights_of_something_else_are_told(how: str, whole: Path) -> None:
    path = whole / "meta" / "weights.safetensors"
    path.write_bytes(SAFETENSORS[how])
    before = state(whole)
    told = refusal(lambda: loaded(whole))
    assert told is not None and str(path) in told
    assert changes(before, state(whole)) == set()


def _with(**changed: object) -> Callable[[dict[str, Any]], object]:
    return lambda facts: facts["progress"].update(changed)


PROGRESS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no progress": lambda facts: facts.pop("progress"),
    "progress a list": lambda facts: facts.update(progress=[]),
    "inputs a list": lambda facts: facts.update(inputs=[1]),
    "no inputs": lambda facts: facts.pop("inputs"),
    "other inputs": lambda facts: facts.update(inputs={"seed\n": 5}),
    "another field": _with(colour="red"),
    **{
        f"{name} {value!r}": _with(**{name: value})
        for name in ("step", "best_step", "skipped", "skipped_in_a_row", "best_score", "seconds", "cpu_seconds", "scores")
        for value in ("x", None, [], {}, 10**400)
        if not (name == "scores" and value in ([], {}))  # there were none, then
    },
    **{f"step {value!r}": _with(step=value) for value in (-5, 0.5, True, 1 << 70)},
    **{f"scores {value!r}": _with(scores=value) for value in ([1], [[1]], [["x", 1]], [[1, "x"]], [[1, 2, 3]])},
}


@pytest.mark.parametrize("how", list(PROGRESS))
def test_checkpoint_with_other_facts_is_told(how: str, begun: Path) -> None:
    (begun / "student" / "checkpoint.previous.safetensors").unlink()
    path = begun / "student" / "checkpoint.safetensors"
    tensors, facts = load_tensors(path)
    PROGRESS[how](facts)
    save_tensors(path, tensors, facts)
    before = state(begun)
    told = refusal(lambda: again(begun))
    assert told is not None and told.startswith(f"{path}: ")
    assert changes(before, state(begun)) == set()


MOMENTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a name without a number": lambda tensors: tensors.update({"optimizer.adam.x.exp_avg": torch.zeros(1)}),
    "a name of more parts": lambda tensors: tensors.update({"optimizer.adam.0.a.b": torch.zeros(1)}),
    "a name of one part": lambda tensors: tensors.update({"optimizer.adam.0": torch.zeros(1)}),
    "a number too large": lambda tensors: tensors.update({"optimizer.adam.999.step": torch.tensor(1.0)}),
    "another shape": lambda tensors: tensors.update({"optimizer.adam.0.exp_avg": torch.zeros(1)}),
    "one missing": lambda tensors: tensors.pop("optimizer.adam.0.exp_avg"),
}


@pytest.mark.parametrize("how", list(MOMENTS))
def test_checkpoint_with_other_moments_is_told(how: str, begun: Path) -> None:
    path = begun / "student" / "checkpoint.safetensors"
    tensors, facts = load_tensors(path)
    MOMENTS[how](tensors)
    save_tensors(path, tensors, facts)
    told = refusal(lambda: again(begun))
    assert told is not None and told.startswith(f"{path}: no checkpoint of a training")
