"""Rows from files that somebody else may have made: read whole, or refused with their place."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_comparison import SUPPORT, plain_rows, rows, write_rows

from dmoe.errors import UserError
from dmoe.report.rows import Protocol, read_results, settings_text


def small(**changes: Any) -> dict[str, Any]:
    return {**rows(seeds=1, domains=2)[0], **changes}


def test_every_row_of_a_comparison_is_there_once(tmp_path: Path) -> None:
    made = rows(seeds=2, domains=3)
    found = read_results(write_rows(tmp_path, made) / "results.jsonl")
    for kind, known in (("test", found.tests), ("ablation", found.ablations), ("trial", found.trials)):
        assert len(known) == sum(row["kind"] == kind for row in made)
    first = found.tests[0]
    assert (first.method, first.seed, first.mean, dict(first.domains)) == ("ERM", 1, made[0]["mean"], made[0]["domains"])


def test_rows_of_a_plain_run_are_tests_by_domain_in_their_headline_metric(tmp_path: Path) -> None:
    found = read_results(write_rows(tmp_path, plain_rows()) / "results.jsonl")
    assert [row.method for row in found.tests] == ["ERM student", "batch statistics", "before adapting", "adapted"]
    for row, made in zip(found.tests, plain_rows(), strict=True):
        assert row.protocol == Protocol("per domain", SUPPORT, score_support=True, predict="after")
        assert row.domains == {name: metrics["accuracy"] for name, metrics in made["domains"].items()}
        assert row.facts["data"] == made["data"]


def test_domains_of_a_regression_are_told_by_correlation(tmp_path: Path) -> None:
    row = small(unit="value", metric="r_worst_group", domains={"a": {"mse": 1.0, "r": 0.5}, "b": {"mse": 2.0, "r": None}})
    found = read_results(write_rows(tmp_path, [row]) / "results.jsonl").tests[0]
    assert (found.metric, found.domains) == ("r", {"a": 0.5, "b": None})


def test_of_a_test_that_was_made_twice_the_last_counts(tmp_path: Path) -> None:
    found = read_results(write_rows(tmp_path, [small(mean=0.1), small(mean=0.2, seed=2), small(mean=0.3)]) / "results.jsonl")
    assert [(row.seed, row.mean) for row in found.tests] == [(1, 0.3), (2, 0.2)]


def test_rows_of_other_splits_than_target_are_left_out_where_there_is_target(tmp_path: Path) -> None:
    found = read_results(write_rows(tmp_path, [small(split="validation"), small()]) / "results.jsonl")
    assert [row.split for row in found.tests] == ["target"]
    alone = read_results(write_rows(tmp_path, [small(split="validation")]) / "results.jsonl")
    assert [row.split for row in alone.tests] == ["validation"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"method": "ERM"}',
        json.dumps(small(mean="0.8")),
        json.dumps(small(mean=True)),
        json.dumps(small()).replace('"worst": ', '"was": 1, "worst": 1e999, "is": '),
        json.dumps(small(images="many")),
        json.dumps(small(worst=10**400)),
        json.dumps(small(worst=1e300)),
        json.dumps(small(seed=-1)),
        json.dumps(small(seed=1.5)),
        json.dumps(small(support_size=None)),
        json.dumps(small(domains=[0.1])),
        json.dumps(small(domains={"a": "b"})),
        json.dumps(small(cost=[1])),
        json.dumps(small(unit=["fraction"])),
        json.dumps(small(kind="else")),
        json.dumps({"kind": "trial", "method": "TENT", "settings": {}, "score": "high"}),
    ],
)
def test_a_damaged_line_is_told_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(small())}\n\n{line}\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line [23]: damaged"):
        read_results(path)


def test_what_is_no_text_or_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"results\.jsonl: cannot be read: No such file.*run\.py"):
        read_results(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_results(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no tests"):
        read_results(path)


def test_two_data_sets_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 data sets, expected 1"):
        read_results(write_rows(tmp_path, [small(), small(dataset="other")]) / "results.jsonl")


def test_what_is_not_a_number_is_not_known(tmp_path: Path) -> None:
    found = read_results(write_rows(tmp_path, [small(mean=float("nan"), worst=None)]) / "results.jsonl").tests[0]
    assert (found.mean, found.worst) == (None, None)


def test_names_are_printable_and_of_one_line_and_short(tmp_path: Path) -> None:
    made = small(method="a\nb\x1b[2J\ud800" + "c" * 1000)
    name = read_results(write_rows(tmp_path, [made]) / "results.jsonl").tests[0].method
    assert name.isprintable()
    assert len(name) <= 160
    name.encode()


def test_settings_are_written_as_one_types_them() -> None:
    assert (
        settings_text({"lr": 0.0010, "steps": 10, "filter": True, "name": "adam"}) == "lr=0.001, steps=10, filter=True, name=adam"
    )
    assert settings_text(None) == ""
