"""Facts in JSON files, of any kind whatever: taken as documented, or told in one line."""

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from doors import again, in_time, loaded, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmoe.artifacts import load_tensors, read_json, save_tensors
from dmoe.command_line import _names_in
from dmoe.data.partition import read_partition
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError
from dmoe.loop import Progress
from dmoe.meta.choice import Choice
from dmoe.run_folder import Stage
from dmoe.tasks import Task
from dmoe.tokens import is_stored

bounded = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, 1e308, -1, "\x1b", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

GRADIENT = {"way": {"method": "double_backward", "chunk_size": None}, "gigabytes": 1.0, "seconds": 0.5, "memory_gb": None}
PARTITION = {"experts": [[0, 2], [1]], "names": {"0": "a"}}
MODEL = {
    "task": {"kind": "multiclass", "num_outputs": 10},
    "transform": {"image_shape": [1, 14, 14], "mean": [0.0], "std": [1.0], "per_image": False},
    "class_names": ["a", "b"],
}
MANIFEST = {"stage": "student", "inputs": {"seed": 1}, "files": {"weights.safetensors": "0" * 64}, "figures": {"step": 2}}
PROGRESS = {"step": 1, "best_score": 0.5, "best_step": 1, "seconds": 1.0, "cpu_seconds": 1.0, "scores": [[1, 0.5]], "skipped": 0}


def places(facts: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [above, *(place for key, value in inner for place in places(value, (*above, key)))]


@st.composite
def changed(draw: st.DrawFn, facts: dict[str, Any]) -> Any:
    """The facts with another value somewhere, or something else altogether."""
    place, value = draw(st.sampled_from(places(facts))), draw(values)
    if not place:
        return value
    whole = copy.deepcopy(facts)
    section: Any = whole
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    return whole


def written(path: Path, facts: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts), encoding="utf-8")
    return path


@bounded
@given(facts=changed(PARTITION))
def test_any_partition_is_of_numbers_or_told(facts: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "partition.json", facts)
    told = refusal(lambda: read_partition(path))
    assert told is None or told.startswith(f"{path}: ")


@bounded
@given(facts=changed({"images": ["a.png"]}))
def test_any_list_of_unreadable_images_is_of_names_or_told(facts: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "unreadable.json", facts)
    told = refusal(lambda: _names_in(path))
    assert told is None or told.startswith(f"{path}: ")


@bounded
@given(facts=changed(GRADIENT))
def test_any_way_to_the_gradient_is_one_or_not(facts: Any) -> None:
    try:
        way = Choice.from_facts(facts).way
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    assert way.chunk_size is None or way.chunk_size >= 1


@bounded
@given(facts=changed(MODEL["transform"]))
def test_any_transform_is_one_or_not(facts: Any) -> None:
    try:
        transform = ImageTransform.from_facts(facts)
    except (KeyError, TypeError, ValueError):
        return
    assert min(transform.image_shape) >= 1 and len(transform.image_shape) == 3


@bounded
@given(facts=changed(MODEL["task"]))
def test_any_task_is_one_or_not(facts: Any) -> None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        assert Task.from_facts(facts).num_outputs >= 1


@bounded
@given(facts=changed(PROGRESS))
def test_any_progress_is_one_or_not(facts: Any) -> None:
    try:
        progress = Progress.from_facts(facts)
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    assert progress.step >= 0
    assert all(type(step) is int and type(score) is float for step, score in progress.scores)
    progress.summary()


@bounded
@given(facts=changed(MANIFEST))
def test_any_manifest_is_refused_unless_it_is_the_stages_own(facts: Any, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "student", {"seed": 1})
    written(stage.manifest, facts)
    told = refusal(stage.finished)
    assert told is not None or facts["files"] == {}
    assert told is None or str(stage.folder) in told


@bounded
@given(facts=changed({"key": "0", "sha256": {"0": "0"}}))
def test_any_manifest_of_tokens_is_not_theirs_or_told(facts: Any, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "source", {"seed": 1})
    path = written(stage.manifest, facts)
    told = refusal(lambda: is_stored(stage))
    assert told is None or told.startswith(f"{path}: ")


@settings(parent=bounded, max_examples=80)
@given(facts=changed(MODEL))
def test_any_description_makes_a_model_or_is_told(facts: Any, whole: Path) -> None:
    path = written(whole / "model.json", facts)
    told = refusal(lambda: loaded(whole))
    assert told is not None
    assert str(path) in told or "weights.safetensors" in told or "small_conv is for images" in told


@settings(parent=bounded, max_examples=40)
@given(seed=st.integers(0, 1 << 32), cut=st.none() | st.floats(0, 0.999))
def test_any_damage_to_a_checkpoint_leaves_the_one_before_it(seed: int, cut: float | None, begun: Path) -> None:
    path = begun / "student" / "damaged.safetensors"
    content, random_ = bytearray((begun / "student" / "checkpoint.safetensors").read_bytes()), random.Random(seed)
    if cut is None:
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    told = refusal(lambda: load_tensors(path))
    assert told is not None and told.startswith(f"{path}: ")


@settings(parent=bounded, max_examples=10)
@given(facts=changed({"inputs": {"seed": 1}, "progress": PROGRESS}))
def test_any_facts_of_a_checkpoint_are_told(facts: Any, begun: Path, made: Any) -> None:
    """Their inputs are never the stage's."""
    folder = begun / "student"
    (folder / "checkpoint.previous.safetensors").unlink(missing_ok=True)
    tensors, _ = load_tensors(made.checkpoints / "checkpoint.safetensors")
    save_tensors(folder / "checkpoint.safetensors", tensors, facts if isinstance(facts, dict) else {"facts": facts})
    told = refusal(lambda: again(begun))
    assert told is not None and told.startswith(f"{folder / 'checkpoint.safetensors'}: ")


@settings(parent=bounded, max_examples=300)
@given(content=st.binary(max_size=40) | st.text(alphabet='[]{}:,"\\1e-.nulaNI', max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with in_time():
        try:
            assert isinstance(read_json(path), dict)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()


NAMES: list[Any] = [None, 3, "x", {}, [3], [[]], [None], {"a": 1}]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_a_list_of_unreadable_images_that_is_none_is_told_by_the_run(names: Any, whole: Path) -> None:
    written(whole / "unreadable.json", {"images": names})
    told = refusal(lambda: again(whole))
    assert told is not None and "unreadable.json: damaged" in told
