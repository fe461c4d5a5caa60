"""The README's tables: those of the rows that are in the checkout, and as the rows say."""

from pathlib import Path

import numpy as np
import pytest
from fake_comparison import MEANS, plain_rows, rows, write_rows

from dmoe.errors import UserError
from dmoe.report.__main__ import main
from dmoe.report.comparison import Comparison
from dmoe.report.readme import BEGIN, END, markdown, results_in, section_of, with_section
from dmoe.report.rows import Results, read_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read_results(write_rows(tmp_path_factory.mktemp("readme"), rows()) / "results.jsonl")


def tables(text: str) -> list[list[list[str]]]:
    """Of each table in Markdown its rows, without bold."""
    blocks = [[line for line in block.split("\n") if line.startswith("|")] for block in text.split("\n\n")]
    return [
        [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in block if not line.startswith("|---")]
        for block in blocks
        if block
    ]


def test_readme_and_results_of_this_checkout_agree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found, section = results_in(ROOT / "docs" / "results"), section_of(readme, where="README.md")
    if not found and section is None:
        return
    assert found, "README.md has results, docs/results has none"
    assert section is not None, "docs/results has results, README.md has no place for them"
    assert section.strip() == markdown(found).strip(), "python -m dmoe.report --readme makes them agree"


def test_the_first_table_has_every_method_with_mean_worst_domain_and_difference(results: Results) -> None:
    first = tables(markdown([results]))[0]
    assert first[0] == ["accuracy, %", "mean", "worst domain", "difference to ERM (95 % interval)"]
    assert {row[0] for row in first[1:]} == set(MEANS)
    main = {"method": "T3A", "kind": "test", "protocol": "per domain", "support_size": 64, "score_support": True}
    known = [100 * row["mean"] for row in rows() if all(row.get(key) == value for key, value in main.items())]
    cell = next(row[1] for row in first if row[0] == "T3A")
    assert [float(part) for part in cell.split(" ± ")] == pytest.approx([np.mean(known), np.std(known, ddof=1)], abs=0.051)


def test_there_is_a_table_of_support_sizes_protocols_and_ablations(results: Results) -> None:
    text = markdown([results])
    methods, support, protocols, ablations = tables(text)
    assert len(methods) == len(MEANS) + 1
    assert support[0][1:] == ["4", "8", "16", "32", "64", "128"]
    best = Comparison(results).best_other
    assert [row[0] for row in support[1:]] == ["Meta-DMoE", best, "SHOT-IM", "ERM"]  # the last but one: best of those at test time
    assert {"per domain", "per domain, support not scored", "continual*, predicted before the update"} < {*protocols[0]}
    assert "*: batches of the first 320 images of each domain" in text
    assert ["Aggregator", "max"] in [row[:2] for row in ablations]
    assert "Meta-DMoE is first by more than the interval" in text


@pytest.mark.parametrize(("steady", "left"), [("T3A", "T3A"), ("ERM", None)])
def test_by_protocols_only_what_differs_and_the_baseline_are_told(tmp_path: Path, steady: str, left: str | None) -> None:
    made = rows(seeds=2, domains=3)
    tests = [row for row in made if row["kind"] == "test" and row["method"] == steady]
    alike = {(row["seed"], row["images"], row["score_support"]): row["mean"] for row in tests}
    for row in tests:
        row["mean"] = alike[row["seed"], row["images"], row["score_support"]]
    text = markdown([read_results(write_rows(tmp_path, made) / "results.jsonl")])
    protocols = next(table for table in tables(text) if table[0][0] == "accuracy, %, by protocol")
    known = {row["method"] for row in made if row["kind"] == "test" and row["protocol"] != "per domain"}
    assert known - {row[0] for row in protocols[1:]} == ({left} if left else set())
    assert ("treats each image by itself is left out" in text) == (left is not None)


def test_each_data_set_has_a_part_digits_first(results: Results) -> None:
    other = Results("alps", results.tests, (), ())
    text = markdown([results, other])
    assert [line for line in text.split("\n") if line.startswith("### ")] == ["### digits", "### alps"]
    assert len(tables(text)) == 4 + 3


def test_a_comparison_is_called_as_its_file(tmp_path: Path) -> None:
    for name in ("digits-transformers", "digits", "alps"):
        (write_rows(tmp_path, plain_rows()) / "results.jsonl").rename(tmp_path / f"{name}.jsonl")
    text = markdown(results_in(tmp_path))
    assert [line for line in text.split("\n") if line.startswith("### ")] == ["### digits", "### alps", "### digits, transformers"]


def test_cells_cannot_leave_their_table(tmp_path: Path) -> None:
    made = [{**row, "method": f"a|b<img src=x>{row['method']}"} for row in plain_rows()]
    text = markdown([read_results(write_rows(tmp_path, made) / "results.jsonl")])
    assert "a\\|b&lt;img" in text
    assert "<img" not in text


def test_the_command_rewrites_what_is_between_the_marks_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with pytest.raises(UserError, match=r"docs/results: holds no \.jsonl"):
        main(["--readme"])
    folder = write_rows(tmp_path / "docs" / "results", plain_rows())
    (folder / "results.jsonl").rename(folder / "digits.jsonl")
    main(["--readme"])
    written = (tmp_path / "README.md").read_text()
    expected = markdown(results_in(folder))
    assert written == f"before\n{BEGIN}\n\n{expected}\n{END}\nafter\n"
    main(["--readme"])
    assert (tmp_path / "README.md").read_text() == written


@pytest.mark.parametrize("readme", ["no marks", f"{BEGIN} only", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_marks_that_are_not_a_pair_are_told(readme: str) -> None:
    with pytest.raises(UserError, match=r"README\.md: (has no place|must have the lines)"):
        with_section(readme, "new", where="README.md")
