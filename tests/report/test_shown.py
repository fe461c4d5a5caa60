"""Evidence from files that somebody else may have made."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_comparison import evidence, png

from dmoe.errors import UserError
from dmoe.report.shown import Evidence, curves_of, read_evidence, run_folders

GOOD = png(np.arange(64).reshape(8, 8))


def changed(**changes: Any) -> dict[str, Any]:
    facts = {**evidence(domains=2), **changes}
    facts["examples"] = facts["examples"][:3]
    return facts


def example(image: Any) -> list[dict[str, Any]]:
    return [{"domain": "a", "image": image, "truth": 1, "before": 2, "after": 1}]


def test_evidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = changed()
    (tmp_path / "evidence.json").write_text(json.dumps(facts))
    found = read_evidence(tmp_path / "evidence.json")
    assert found.attention is not None
    assert [list(row) for row in found.attention.weights] == facts["attention"]["weights"]
    assert [vars(one) for one in found.examples] == facts["examples"]
    assert found.curves == {stage: [tuple(point) for point in points] for stage, points in facts["curves"].items()}


def test_without_evidence_there_is_none(tmp_path: Path) -> None:
    assert read_evidence(tmp_path / "evidence.json") == Evidence()
    (tmp_path / "evidence.json").write_text('{"attention": null, "examples": [], "curves": {}}')
    assert read_evidence(tmp_path / "evidence.json") == Evidence(None, [], None)


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {"attention": [1]},
        changed(attention={"experts": [], "domains": ["a"], "weights": [[]]}),
        changed(attention={"experts": ["x"], "domains": ["a"], "weights": [[0.5, 0.5]]}),
        changed(attention={"experts": ["x"], "domains": ["a"], "weights": [["0.5"]]}),
        changed(attention={"experts": ["x"] * 300, "domains": ["a"] * 300, "weights": []}),
        {"examples": {"a": 1}},
        {"examples": [{"domain": "a"}]},
        {"examples": example(GOOD) * 49},
        {"examples": example(7)},
        {"examples": example("%%%")},
        {"examples": example("A" * 40_001)},
        {"examples": example(base64.b64encode(b"GIF89a" + bytes(60)).decode())},
        {"examples": example(base64.b64encode(base64.b64decode(GOOD)[:40]).decode())},
        {"examples": example(base64.b64encode(base64.b64decode(GOOD)[:60] + b"x" + base64.b64decode(GOOD)[61:]).decode())},
        {"examples": example(png(np.zeros((97, 8))))},
        {"examples": example(GOOD + '" onload="alert(1)')},
        {"curves": []} | {"curves": [1]},
        {"curves": {"meta": [[1]]}},
        {"curves": {"meta": [[None, 1]]}},
        {"curves": {"meta": [[0, 0]] * 2001}},
        {"curves": {str(n): [] for n in range(65)}},
    ],
)
def test_damaged_evidence_is_told(tmp_path: Path, facts: Any) -> None:
    (tmp_path / "evidence.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"evidence\.json: damaged"):
        read_evidence(tmp_path / "evidence.json")


def test_curves_are_those_of_stages_that_were_judged(tmp_path: Path) -> None:
    for stage, figures in {
        "meta": {"scores": [[5, 0.5], [6, float("nan")]], "best_score": float("-inf")},
        "experts/expert_00": {"scores": [[1, 0.1]]},
        "tokens/source": {},
        "compare/erm/full": {"scores": [[9, 0.9]]},
        "compare/erm/trial_0": {"scores": [[2, 0.2]]},
    }.items():
        (tmp_path / stage).mkdir(parents=True)
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"figures": figures}))
    assert curves_of(tmp_path) == {"compare/erm": [(9.0, 0.9)], "experts/expert_00": [(1.0, 0.1)], "meta": [(5.0, 0.5)]}
    (tmp_path / "meta" / "manifest.json").write_text('{"figures": 7}')
    with pytest.raises(UserError, match=r"meta/manifest\.json: damaged"):
        curves_of(tmp_path)


def test_seeds_are_folders_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert run_folders(tmp_path) == [tmp_path]
    for name in ("seed_10", "seed_2", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed_1").write_text("no folder")
    assert [path.name for path in run_folders(tmp_path)] == ["seed_2", "seed_10"]
