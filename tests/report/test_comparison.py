"""What is read from the rows: against sums worked out here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_comparison import ABLATIONS, IMAGES, MEANS, SIZES, SUPPORT, plain_rows, rows, write_rows

from dmoe.report.comparison import MISSING, Comparison, Unit, headline, is_first, unit_of
from dmoe.report.rows import Protocol, read_results
from dmoe.report.statistics import Difference, Spread


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    return rows()


@pytest.fixture(scope="module")
def comparison(made: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return of(made, tmp_path_factory.mktemp("comparison"))


def of(made: list[dict[str, Any]], folder: Path) -> Comparison:
    return Comparison(read_results(write_rows(folder, made) / "results.jsonl"))


def values(made: list[dict[str, Any]], method: str, **like: Any) -> list[dict[str, Any]]:
    like = {"kind": "test", "protocol": "per domain", "support_size": SUPPORT, "score_support": True, "predict": "after", **like}
    return [row for row in made if row["method"] == method and all(row.get(key) == value for key, value in like.items())]


def test_the_table_has_every_method_best_first_and_the_oracle_last(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    lines = {line.name: line for line in comparison.lines}
    assert set(lines) == set(MEANS)
    assert list(lines)[-1] == "oracle: told the domain"
    ranked = [line.mean.mean for line in comparison.lines[:-1] if line.mean]
    assert ranked == sorted(ranked, reverse=True)
    for method, line in lines.items():
        for key, found in (("mean", line.mean), ("worst", line.worst)):
            known = [row[key] for row in values(made, method)]
            assert found is not None
            assert (found.mean, found.deviation) == (pytest.approx(np.mean(known)), pytest.approx(np.std(known, ddof=1)))
        assert line.cost["adapt_ms"] == pytest.approx(np.mean([row["cost"]["adapt_ms"] for row in values(made, method)]))


def test_differences_are_paired_by_seed_and_domain(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    baseline = {row["seed"]: row["domains"] for row in values(made, "ERM")}
    for line in comparison.lines:
        if line.name == "ERM":
            assert line.difference is None
            continue
        pairs = [v - baseline[row["seed"]][d] for row in values(made, line.name) for d, v in row["domains"].items()]
        assert line.difference is not None
        assert (line.difference.mean, line.difference.pairs) == (pytest.approx(np.mean(pairs)), 80)


def test_a_seed_or_domain_that_only_one_method_has_is_no_pair(made: list[dict[str, Any]], tmp_path: Path) -> None:
    kept = [row for row in made if not (row["method"] == "TENT" and row["seed"] > 2)]
    line = next(line for line in of(kept, tmp_path).lines if line.name == "TENT")
    assert line.difference is not None
    assert line.difference.pairs == 32


def test_the_main_protocol_is_of_the_support_size_of_most_methods(comparison: Comparison) -> None:
    assert comparison.main == Protocol("per domain", SUPPORT)


def test_where_all_methods_have_all_sizes_the_main_one_is_that_of_the_other_protocols(tmp_path: Path) -> None:
    first = rows(seeds=1, domains=2)[0]
    made = [{**first, "support_size": size} for size in (8, 16, 32)] + [{**first, "protocol": "continual", "support_size": 16}]
    assert of(made, tmp_path).main.support_size == 16


def test_curves_by_support_size_are_of_the_main_protocol(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    curves = comparison.by_support()
    assert set(curves) == {"ERM", "Meta-DMoE", "TENT", "SHOT-IM", "ARM-CML", "T3A"}
    for size in SIZES:
        known = [row["mean"] for row in values(made, "Meta-DMoE", support_size=size)]
        assert curves["Meta-DMoE"][size].mean == pytest.approx(np.mean(known))


def test_protocols_that_differ_by_more_than_the_support_size_have_a_column_each(
    comparison: Comparison, made: list[dict[str, Any]]
) -> None:
    protocols = comparison.protocols()
    assert protocols[0] == comparison.main
    assert len(protocols) == len(set(protocols)) == 8
    cell = comparison.by_protocol()["TENT"][protocols.index(Protocol("continual", SUPPORT, predict="before", images=IMAGES))]
    assert cell is not None
    assert cell.mean == pytest.approx(np.mean([r["mean"] for r in values(made, "TENT", protocol="continual", predict="before")]))


def test_single_domains_are_means_over_seeds(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    found = comparison.by_domain()
    assert list(found) == ["ERM", "Meta-DMoE before adapting", "Meta-DMoE"]
    for method, domains in found.items():
        for domain, (mean, half) in domains.items():
            known = [row["domains"][domain] for row in values(made, method)]
            assert mean == pytest.approx(np.mean(known))
            assert half == pytest.approx(2.7764451 * np.std(known, ddof=1) / np.sqrt(5))  # t of 4 degrees of freedom, 97.5 %


def test_ablations_are_compared_with_ours(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    found = comparison.ablations()
    assert {group: [line.name for line in lines] for group, lines in found.items()} == {g: list(s) for g, s in ABLATIONS.items()}
    ours = np.mean([row["mean"] for row in values(made, "Meta-DMoE")])
    mean = np.mean([row["mean"] for row in values(made, "Meta-DMoE", kind="ablation", setting="max")])
    line = found["aggregator"][1]
    assert line.difference is not None
    assert line.difference.mean == pytest.approx(mean - ours)


def test_trials_are_ranked_and_the_settings_of_the_test_are_the_chosen_ones(comparison: Comparison) -> None:
    tried = {one.method: one for one in comparison.trials()}
    assert set(tried) == {"TENT", "SHOT-IM", "T3A"}
    assert (tried["TENT"].chosen, len(tried["TENT"].scores)) == ("lr=0.001, steps=10", 3)
    assert tried["TENT"].seeds == [1]
    scores = [score.mean for _, score in tried["TENT"].scores if score]
    assert scores == sorted(scores, reverse=True)


def test_the_headline_says_the_mean_and_both_differences(comparison: Comparison, made: list[dict[str, Any]]) -> None:
    means = {m: np.array([row["mean"] for row in values(made, m)]) for m in ("ERM", "Meta-DMoE", "ARM-CML")}
    first, baseline, other = headline(comparison)
    assert f"Meta-DMoE reaches {100 * means['Meta-DMoE'].mean():.1f} ± " in first
    assert "16 target domains of digits (5 seeds)" in first
    assert f"{100 * (means['Meta-DMoE'] - means['ERM']).mean():.1f} points (95 % interval" in baseline
    assert baseline.endswith("above ERM.")
    assert f"{100 * (means['Meta-DMoE'] - means['ARM-CML']).mean():.1f} points" in other
    assert other.endswith("the best other method, ARM-CML.")
    assert "is first by more than the interval" in is_first(comparison)


def test_a_difference_that_may_be_none_is_not_called_one(made: list[dict[str, Any]], tmp_path: Path) -> None:
    twin = [{**row, "method": "Twin"} for row in values(made, "Meta-DMoE")]
    for row in twin:
        sign = 1 if row["seed"] % 2 else -1
        row["domains"] = {d: v + sign * 0.01 for d, v in row["domains"].items()}
        row["mean"] += sign * 0.01
    found = of([*values(made, "ERM"), *values(made, "Meta-DMoE"), *twin], tmp_path)
    assert "cannot be told apart from the best other method, Twin" in headline(found)[-1]
    assert "is not first by more than the interval" in is_first(found)


def test_where_ours_is_worse_it_is_said(made: list[dict[str, Any]], tmp_path: Path) -> None:
    worse = [{**row, "domains": {d: v - 0.2 for d, v in row["domains"].items()}} for row in values(made, "Meta-DMoE")]
    found = of([*values(made, "ERM"), *worse], tmp_path)
    assert "below ERM" in headline(found)[1]
    assert "is not first:" in is_first(found)


def test_where_nothing_differs_it_is_said(made: list[dict[str, Any]], tmp_path: Path) -> None:
    same = [{**row, "method": "Meta-DMoE"} for row in values(made, "ERM")]
    assert headline(of([*values(made, "ERM"), *same], tmp_path))[1] == "That is level with ERM, also the best other method."


def test_a_plain_run_has_its_own_names(tmp_path: Path) -> None:
    found = of(plain_rows(), tmp_path)
    assert (found.baseline, found.before, found.ours) == ("ERM student", "before adapting", "adapted")
    assert headline(found)[0].startswith("The adapted student reaches 88.8 % accuracy")
    assert not found.by_support()
    assert not found.by_protocol()


def test_without_ours_the_best_is_told(made: list[dict[str, Any]], tmp_path: Path) -> None:
    found = of([*values(made, "ERM"), *values(made, "TENT")], tmp_path)
    assert headline(found) == [
        f"ERM is best on 16 domains of digits (5 seeds): {unit_of(found.results).spread(found.lines[0].mean)} % accuracy."
    ]


def test_fractions_are_percent_and_values_are_not() -> None:
    difference = Difference(-0.012, -0.02, 0.001, pairs=4)
    assert Unit("accuracy", percent=True).spread(Spread(0.8768, 0.0123, 5)) == "87.7 ± 1.2"
    assert Unit("r", percent=False).spread(Spread(0.8768, None, 1)) == "0.877"
    assert Unit("accuracy", percent=True).interval(difference) == "-1.2 (-2.0 to +0.1)".replace("-", "\N{MINUS SIGN}")
    assert Unit("r", percent=False).interval(None) == MISSING
