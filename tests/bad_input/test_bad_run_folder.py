"""Files of a run folder, each damaged in every way: told in one line, or handled, and no other file is touched."""

import json
import shutil
from pathlib import Path

import pytest
from damages import ALL, CUT, FLIPPED, KINDS, TEXTS, Damage
from doors import Door, Made, again, changes, evaluated, loaded, refusal, state

from dmoe.artifacts import digest_of_file, read_json

WEIGHTS = {**CUT, **FLIPPED, **KINDS}
CHECKPOINTS = {how: damage for how, damage in WEIGHTS.items() if how != "a link to itself"}  # which is as good as no file
FACTS = ALL

CASES: list[tuple[str, Door, dict[str, Damage], set[str]]] = [
    ("config.yaml", loaded, FACTS, set()),
    ("config.yaml", evaluated, TEXTS, set()),
    ("model.json", loaded, FACTS, set()),
    ("meta/weights.safetensors", loaded, WEIGHTS, set()),
    ("experts/expert_01/weights.safetensors", loaded, WEIGHTS, set()),
    ("experts/partition.json", again, FACTS, set()),
    ("experts/expert_00/manifest.json", again, FACTS, set()),
    ("student/manifest.json", again, FACTS, set()),
    ("meta/manifest.json", again, FACTS, set()),
    ("tokens/source/manifest.json", again, FACTS, {"tokens.npy", "manifest.json"}),
    ("tokens/source/tokens.npy", again, {**CUT, **FLIPPED, **KINDS}, {"manifest.json"}),
    ("results.jsonl", evaluated, {**KINDS, **CUT, "bytes": TEXTS["bytes"]}, set()),
]
EITHER_WAY = {"model.json"}  # is written anew at the end of a run


@pytest.mark.parametrize(
    ("name", "door", "damage", "may_change"),
    [
        pytest.param(name, door, damage, may_change, id=f"{name}, {how}, {door.__name__}")
        for name, door, damages, may_change in CASES
        for how, damage in damages.items()
    ],
)
def test_damaged_file_is_told_or_handled(
    name: str, door: Door, damage: Damage, may_change: set[str], whole: Path, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    path = whole / name
    damage(path)
    before = state(whole, made.pictures)
    told = refusal(lambda: door(whole))
    changed = changes(before, state(whole, made.pictures))
    if told is None:
        assert changed <= {path.name, *may_change, *EITHER_WAY}
    else:
        assert path.name in told or str(path.parent) in told
        assert changed <= (
            may_change if "tokens" in name else set()
        )  # the one manifest that is dropped before its file is made anew
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("how", list(CHECKPOINTS))
def test_damaged_checkpoint_gives_way_to_the_one_before_it(how: str, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKPOINTS[how](begun / "student" / "checkpoint.safetensors")
    told = refusal(lambda: again(begun))
    assert told is None or (how == "a folder" and "checkpoint.safetensors: cannot be written: " in told)
    assert "; going on from checkpoint.previous.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("how", list(CHECKPOINTS))
def test_damaged_checkpoints_are_told_where_there_is_none_before(how: str, begun: Path, made: Made) -> None:
    (begun / "student" / "checkpoint.previous.safetensors").unlink()
    CHECKPOINTS[how](begun / "student" / "checkpoint.safetensors")
    before = state(begun, made.pictures)
    told = refusal(lambda: again(begun))
    assert told is not None and "checkpoint.safetensors: " in told
    assert changes(before, state(begun, made.pictures)) == set()


@pytest.mark.parametrize("how", list(FACTS))
def test_damaged_note_on_the_gradient_is_told(how: str, begun: Path) -> None:
    shutil.copytree(begun / "student", begun / "meta")
    config = begun / "config.yaml"
    config.write_text(config.read_text().replace("gradient: double_backward", "gradient: auto"))
    for path in (begun / "meta").glob("*.safetensors"):
        path.unlink()
    note = begun / "meta" / "gradient.json"
    note.write_text('{"way": {"method": "double_backward", "chunk_size": null}, "gigabytes": 0, "seconds": 0, "memory_gb": null}')
    FACTS[how](note)
    told = refusal(lambda: again(begun))
    assert told is None or "gradient.json: " in told


LINKED = ["student/lock", "lock", "tokens/source/tokens.npy", "results.jsonl", "model.json"]


@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_written_into_what_a_link_in_a_run_folder_leads_to(name: str, whole: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("{}\n")
    (whole / name).unlink()
    (whole / name).symlink_to(treasure)
    refusal(lambda: again(whole))
    assert treasure.read_text() == "{}\n"


def test_a_run_folder_may_be_a_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(whole)
    assert refusal(lambda: again(tmp_path / "linked")) is None


NAMES = ["../../config.yaml", "/etc/passwd", "..", "", "a\nb\x1b[31m", "x" * 300, "a\0b", "\udc80"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_in_a_manifest_stay_in_their_folder(name: str, whole: Path) -> None:
    path = whole / "student" / "manifest.json"
    manifest = read_json(path)
    manifest["files"] = {name: digest_of_file(Path("/etc/passwd"))}
    path.write_text(json.dumps(manifest))
    told = refusal(lambda: again(whole))
    assert told is not None and "missing since it was written" in told
