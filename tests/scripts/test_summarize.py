"""Mean and standard deviation over runs, worked out here."""

from typing import Any

import pytest

from dmoe.errors import UserError
from scripts import summarize


def row(method: str, value: float | None, *, replicate: str = "seed:1", **more: Any) -> dict[str, Any]:
    facts = {"dataset": "iwildcam", "split": "target", "replicate": replicate, "unit": "fraction", "reported": {"f": "macro F1"}}
    return {"method": method, **facts, "overall": {"f": value, "other": 0.0}, "mean": 0.5, "worst": 0.25, **more}


def test_the_table_has_mean_and_sample_deviation() -> None:
    runs = [{"adapted": row("adapted", value, replicate=f"seed:{n}")} for n, value in enumerate((0.2, 0.3, 0.7))]
    lines = summarize.table(runs).splitlines()
    assert lines[0] == "| iwildcam, target | macro F1 | mean of domains | worst domain |"
    assert lines[2] == "| adapted | 40.0 ± 26.5 | 50.0 ± 0.0 | 25.0 ± 0.0 |"
    assert lines[-1] == "Mean ± standard deviation over 3 runs (seed:0, seed:1, seed:2)."


def test_values_that_are_no_fractions_are_not_made_percent() -> None:
    runs = [
        {"adapted": row("adapted", value, replicate=f"fold:{f}", unit="value")} for f, value in zip("AB", (0.4, 0.5), strict=True)
    ]
    assert "| 0.450 ± 0.071 |" in summarize.table(runs)


def test_one_run_has_no_deviation() -> None:
    assert "| adapted | 20.0 | 50.0 | 25.0 |" in summarize.table([{"adapted": row("adapted", 0.2)}])


def test_a_metric_that_is_missing_in_one_run_has_no_mean() -> None:
    runs = [{"adapted": row("adapted", value, replicate=str(value))} for value in (0.2, None)]
    assert "| adapted | - |" in summarize.table(runs)


def test_only_methods_that_every_run_has_are_told() -> None:
    runs = [
        {"a": row("a", 0.1), "b": row("b", 0.2)},
        {"b": row("b", 0.4, replicate="seed:2"), "c": row("c", 0.1, replicate="seed:2")},
    ]
    assert [line.split()[1] for line in summarize.table(runs).splitlines()[2:-2]] == ["b"]


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"adapted": row("adapted", 0.1, replicate="seed:2", dataset="fmow")}, "runs of iwildcam and of fmow"),
        ({"adapted": row("adapted", 0.1)}, "the same replicate twice"),
        ({"other": row("other", 0.1, replicate="seed:2")}, "no method in common"),
    ],
)
def test_runs_that_do_not_belong_together_are_told(second: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        summarize.table([{"adapted": row("adapted", 0.2)}, second])
