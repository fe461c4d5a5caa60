"""Files are written whole or not at all, and damaged ones are refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from told import names, one_line
from torch import nn

from dmoe.artifacts import (
    digest_of_facts,
    digest_of_file,
    load_into,
    load_tensors,
    read_json,
    save_tensors,
    sweep,
    under_prefix,
    with_prefix,
    write_json,
    written_whole,
)
from dmoe.errors import UserError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.int64)}, {"step": 7})
    return path


def test_written_file_has_its_content_and_no_litter_beside_it(tmp_path: Path) -> None:
    with written_whole(tmp_path / "deep" / "file") as beside:
        beside.write_text("new")
    assert (tmp_path / "deep" / "file").read_text() == "new"
    assert names(tmp_path / "deep") == ["file"]


def test_failing_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_old_file_is_there_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_write_that_fails_before_it_begins_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "facts.json", {"not": object()})
    assert names(tmp_path) == []


def test_tensors_and_facts_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"turned": torch.arange(6.0).view(2, 3).T, "count": torch.tensor(5), "half": torch.randn(4, dtype=torch.float64)}
    save_tensors(tmp_path / "file", tensors, {"nested": {"lr": 0.1}, "text": "ü"})
    loaded, facts = load_tensors(tmp_path / "file")
    assert facts == {"nested": {"lr": 0.1}, "text": "ü"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors)


def test_tensors_with_gradient_are_saved_without(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", nn.Linear(2, 2).state_dict(keep_vars=True))
    assert not load_tensors(tmp_path / "file")[0]["weight"].requires_grad


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_tensors(tmp_path / name, {"a": torch.arange(3), "b": torch.ones(2)}, {"step": 1})
    assert digest_of_file(tmp_path / "one") == digest_of_file(tmp_path / "other")


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 200, -1])
def test_cut_off_weights_are_told_with_their_path(weights: Path, kept: int) -> None:
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        load_tensors(weights)
    assert one_line(caught).startswith(f"{weights}: not a whole safetensors file")


def test_missing_weights_are_told_with_their_path(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path / "none.safetensors")
    assert one_line(caught).startswith(f"{tmp_path / 'none.safetensors'}: ")


@pytest.mark.parametrize("content", [b"\0" * 500, b"not weights at all, though long enough", b"\xff" * 64])
def test_garbage_in_place_of_weights_is_told_with_its_path(weights: Path, content: bytes) -> None:
    weights.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tensors(weights)
    assert one_line(caught).startswith(f"{weights}: ")


def test_folder_in_place_of_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tensors(tmp_path)
    assert one_line(caught).startswith(f"{tmp_path}: ")


def test_load_into_copies_every_tensor_buffers_included() -> None:
    torch.manual_seed(0)
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    one(torch.randn(5, 3))
    load_into(other, one.state_dict(), where="here")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("weight"), "here: it lacks weight: "),
        (lambda t: (t.pop("weight"), t.pop("bias")), "here: it lacks weight and 1 more: "),
        (lambda t: t.update(extra=torch.ones(1)), "here: it has no place for extra: "),
        (lambda t: t.update(weight=torch.ones(3, 2)), "here: weight is [3, 2], the network's is [2, 3]"),
    ],
)
def test_load_into_names_the_tensor_that_does_not_fit(change: object, said: str) -> None:
    tensors = dict(nn.Linear(3, 2).state_dict())
    change(tensors)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        load_into(nn.Linear(3, 2), tensors, where="here")
    assert one_line(caught).startswith(said)


def test_refused_tensors_leave_the_module_as_it_was() -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError):
        load_into(module, {"weight": torch.zeros(2, 3), "bias": torch.zeros(9)}, where="here")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_prefix_is_a_whole_word() -> None:
    tensors = {**with_prefix("expert", {"w": torch.tensor(1)}), **with_prefix("experts", {"w": torch.tensor(2)})}
    assert under_prefix("expert", tensors) == {"w": torch.tensor(1)}


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", {"a": [1, 2.5], "b": {"c": None}})
    assert read_json(tmp_path / "facts.json") == {"a": [1, 2.5], "b": {"c": None}}


@pytest.mark.parametrize("content", ["", '{"a": 1', "[1, 2]", "\x00"])
def test_damaged_json_is_told_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert one_line(caught).startswith(f"{path}: damaged")


def test_missing_json_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "none.json")
    assert one_line(caught).startswith(f"{tmp_path / 'none.json'}: ")


def test_digest_of_facts_does_not_depend_on_their_order() -> None:
    assert digest_of_facts({"a": 1, "b": {"c": 2, "d": 3}}) == digest_of_facts({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest_of_facts({"a": 1}) != digest_of_facts({"a": 2})


def test_digest_of_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_of_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_facts_are_json_in_the_safetensors_header(weights: Path) -> None:
    size = int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["dmoe"])["facts"] == {"step": 7}


@pytest.mark.parametrize("place", [-1, -9, 150])
def test_one_changed_bit_in_weights_or_facts_is_told(weights: Path, place: int) -> None:
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tensors(weights)
    assert one_line(caught).startswith(f"{weights}: ")


def test_weights_that_others_wrote_need_no_sum(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "file", metadata={"facts": "theirs", "sha256": "of something"})
    loaded, facts = load_tensors(tmp_path / "file")
    assert torch.equal(loaded["a"], torch.arange(3)) and facts == {}


def test_what_was_there_can_be_kept_under_another_name(tmp_path: Path) -> None:
    for content in ("one", "two", "three"):
        with written_whole(tmp_path / "file", keep=tmp_path / "before") as beside:
            beside.write_text(content)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "three", "before": "two"}


def test_what_killed_processes_left_is_swept_away(tmp_path: Path) -> None:
    for name in (".weights.safetensors.123.part", ".tmpAbC123", "weights.safetensors", ".hidden", "tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == [".hidden", "tmp", "weights.safetensors"]


@pytest.mark.parametrize("way", ["tensors", "json"])
def test_full_disk_is_told_and_what_was_there_stays(small_disk: Path, way: str) -> None:
    path = small_disk / "file"
    save_tensors(path, {"a": torch.zeros(9)})
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        if way == "tensors":
            save_tensors(path, {"a": torch.zeros(1_000_000)})
        else:
            write_json(path, {"a": "b" * 4_000_000})
    assert one_line(caught).startswith(f"{path}: cannot be written: ") and "No space left" in one_line(caught)
    assert path.read_bytes() == before
    assert names(small_disk) == ["file"]
