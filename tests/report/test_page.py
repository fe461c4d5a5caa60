"""The page: what it says is what the rows say, everything is there or said to be missing, and nothing gets out of it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_comparison import MEANS, SUPPORT, plain_rows, png, rows, write_comparison, write_rows
from pages import Element, read, section, table

from dmoe.errors import UserError
from dmoe.report.__main__ import main
from dmoe.report.comparison import MISSING
from dmoe.report.page import build

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ["methods", "support", "protocols", "domains", "ablations", "attention", "examples", "training", "trials"]
SECTIONS += ["published", "notes", "made-of"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("page") / "comparison")


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    return read(build(folder))


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_table_read_back_says_what_the_rows_say(folder: Path, page: Element) -> None:
    head, lines = table(section(page, "methods"))
    assert head == ["method", "mean", "worst domain", "difference to ERM", "training", "adapting", "memory", "predictions"]
    assert set(lines) == set(MEANS)
    for method, cells in lines.items():
        kept = [r for r in results(folder) if r["method"] == method and r["kind"] == "test" and r["protocol"] == "per domain"]
        kept = [r for r in kept if r["support_size"] == SUPPORT and r["score_support"] and r["predict"] == "after"]
        for cell, key in zip(cells, ("mean", "worst"), strict=False):
            values = [100 * row[key] for row in kept]
            assert [float(part) for part in cell.split(" ± ")] == pytest.approx(
                [np.mean(values), np.std(values, ddof=1)], abs=0.051
            )


def test_a_preset_is_in_the_title(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "comparison")
    assert read(build(folder)).all("title")[0].text == "Meta-DMoE on digits"
    (folder / "seed_1" / "config.yaml").write_text("dataset: digits\npreset: beyond\n")
    assert read(build(folder)).all("title")[0].text == "Meta-DMoE on digits, preset beyond"


def test_all_sections_are_there_and_in_the_contents(page: Element) -> None:
    assert [one.attributes["id"] for one in page.all("section")] == SECTIONS
    assert [one.attributes["href"] for one in page.all("nav")[0].all("a")] == [f"#{name}" for name in SECTIONS]


def test_every_figure_says_in_words_what_it_shows_with_its_numbers(folder: Path, page: Element) -> None:
    charts = [one for one in page.all("svg") if one.attributes.get("role") == "img"]
    assert len(charts) == 3 + 4
    assert all(one.attributes.get("aria-hidden") == "true" for one in page.all("svg") if one not in charts)
    said = {
        name: section(page, name).all("svg", role="img")[0].attributes["aria-label"] for name in ("support", "domains", "attention")
    }
    for name in ("support", "domains"):
        for row, cells in table(section(page, name).all("details")[0])[1].items():
            drawn = cells[:3] if name == "domains" else cells
            assert row == "ERM" or all(cell.split(" ")[0] in said[name] for cell in drawn)  # of ERM the curve is a level
    for row in json.loads((folder / "evidence.json").read_text())["attention"]["weights"]:
        assert ", ".join(f"{100 * weight:.0f}" for weight in row) in said["attention"]


def test_single_domains_are_all_in_the_table_of_their_section(folder: Path, page: Element) -> None:
    head, lines = table(section(page, "domains").all("details")[0])
    assert head == ["domain", "ERM", "Meta-DMoE before adapting", "Meta-DMoE", "difference"]
    assert list(lines) == list(results(folder)[0]["domains"])


def test_examples_have_a_mark_beside_the_colour_and_say_in_words_what_they_are(folder: Path, page: Element) -> None:
    examples = json.loads((folder / "evidence.json").read_text())["examples"]
    figures = section(page, "examples").all("figure")
    assert len(figures) == len(examples) == 48
    for figure, one in zip(figures, examples, strict=True):
        marks = [("✓" if one[when] == one["truth"] else "✗") for when in ("before", "after")]
        said = figure.all("figcaption")[0].all("span")
        assert [span.text for span in said] == [
            f"{one[when]}\u202f{mark}" for when, mark in zip(("before", "after"), marks, strict=True)
        ]
        assert [span.attributes["class"] for span in said] == [{"✓": "right", "✗": "wrong"}[mark] for mark in marks]
        (image,) = figure.all("img")
        assert image.attributes["src"] == f"data:image/png;base64,{one['image']}"
        assert image.attributes["alt"] == f"{one['domain']}, truly {one['truth']}: before {one['before']}, after {one['after']}"


def test_it_says_how_it_was_measured(page: Element) -> None:
    notes = section(page, "notes").text
    for said in ("5 seeds (1, 2, 3, 4, 5)", "16 domains", "64 unlabeled images", "bootstrap over both", "TENT 3", "20,000 times"):
        assert said in notes


def test_it_is_self_contained_small_and_quickly_built(folder: Path) -> None:
    began = time.process_time()
    text = build(folder)
    assert time.process_time() - began < 5
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b", text)
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,|#)", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_with_as_many_images_as_may_be_it_is_still_small(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path)
    facts = json.loads((folder / "evidence.json").read_text())
    noise = png(np.random.default_rng(0).integers(0, 256, (96, 96, 3)))
    facts["examples"] = [{**one, "image": noise} for one in facts["examples"]]
    (folder / "evidence.json").write_text(json.dumps(facts))
    assert 1_500_000 < len(build(folder).encode()) < 3_000_000


def test_what_is_missing_is_a_sentence_and_no_empty_frame(tmp_path: Path) -> None:
    page = read(build(write_rows(tmp_path, plain_rows())))
    assert [one.attributes["id"] for one in page.all("section")] == [name for name in SECTIONS if name != "ablations"]
    assert table(section(page, "methods"))[1]["adapted"][:2] == ["88.8", "88.0"]
    for name in ("support", "protocols", "attention", "examples", "training", "trials", "published"):
        part = section(page, name)
        assert len(part.all("p")) == 1
        assert not part.all("svg") + part.all("table") + part.all("img") + part.all("figure")
    assert "What the methods cost was not measured here." in section(page, "methods").text
    assert "trained for less time than the adapted one" in section(page, "notes").text


def test_a_network_trained_alone_has_a_page_without_a_word_of_adapting(tmp_path: Path) -> None:
    alone = {**plain_rows()[0], "method": "ERM", "config": {"dataset": "digits", "method": "erm"}}
    page = read(build(write_rows(tmp_path, [alone])))
    left_out = ("support", "protocols", "ablations", "attention", "examples")
    assert [one.attributes["id"] for one in page.all("section")] == [name for name in SECTIONS if name not in left_out]
    assert page.all("h1")[0].text == "ERM on digits"
    assert "A network trained alone (ERM) reaches 77.8 % accuracy on 16 domains" in page.text
    assert not re.search("after the update|adapted once|as all training of Meta-DMoE", page.text)
    beside = {**plain_rows()[0], "seed": 2}
    assert len(read(build(write_rows(tmp_path, [alone, beside]))).all("section")) == len(SECTIONS) - 1


def test_curves_of_a_plain_run_come_from_its_manifests(tmp_path: Path) -> None:
    write_rows(tmp_path, plain_rows())
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "manifest.json").write_text(json.dumps({"figures": {"scores": [[10, 0.25], [20, 0.5]]}}))
    (chart,) = section(read(build(tmp_path)), "training").all("svg")
    assert "25.0 at 10, 50.0 at 20" in chart.attributes["aria-label"]


def test_published_numbers_are_those_of_the_same_data_set_and_marked(tmp_path: Path) -> None:
    made = [{**row, "dataset": "camelyon"} for row in plain_rows()]
    part = section(read(build(write_rows(tmp_path, made))), "published")
    assert table(part)[1]["Meta-DMoE"] == ["91.4 (1.5)"]
    source = part.all("p", class_="source")[0].text
    assert "Published, not run here" in source
    assert "arXiv 2210.03885" in source
    assert "77.2" not in part.text


def test_a_regression_is_told_in_values(tmp_path: Path) -> None:
    made = [{**row, "unit": "value", "metric": "r_wg", "domains": {"a": {"r": 0.5}, "b": {"r": 0.75}}} for row in plain_rows()]
    cells = table(section(read(build(write_rows(tmp_path, made))), "methods"))[1]["adapted"]
    assert cells[0] == f"{plain_rows()[-1]['mean']:.3f}"


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, seeds=2, domains=3)
    made = rows(seeds=2, domains=3)
    for row in made:
        row.update(paper=HOSTILE, settings={HOSTILE: HOSTILE}, data=HOSTILE, versions={HOSTILE: HOSTILE}, dataset=HOSTILE)
        if "domains" in row:
            row["domains"] = {HOSTILE + name: value for name, value in row["domains"].items()}
        row["method"] = row["method"] if row["method"] in ("ERM", "Meta-DMoE") else row["method"] + HOSTILE
        if row["kind"] == "ablation":
            row.update(group=row["group"] + HOSTILE, setting=row["setting"] + HOSTILE)
        if row.get("protocol") == "continual":
            row["protocol"] = HOSTILE
    write_rows(folder, made)
    facts = json.loads((folder / "evidence.json").read_text())
    facts["attention"]["experts"] = [HOSTILE] * 6
    facts["attention"]["domains"] = [HOSTILE] * 3
    facts["examples"] = [{**one, "domain": HOSTILE, "truth": HOSTILE, "before": HOSTILE} for one in facts["examples"]]
    facts["curves"] = {HOSTILE: [[1, 0.5], [2, 0.6]]}
    (folder / "evidence.json").write_text(json.dumps(facts))
    (folder / "seed_1" / "config.yaml").write_text(HOSTILE)
    text = build(folder)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "49" not in re.findall(r"onerror=alert\(2\)&gt;(.{2})", text)
    assert text.count("{{ 7 * 7 }}") > 20
    allowed = {"src", "alt", "class", "role", "viewBox", "viewbox", "aria-label", "aria-hidden", "tabindex", "scope", "id", "href"}
    for element in read(text).all("svg") + read(text).all("img") + read(text).all("th") + read(text).all("section"):
        assert not {name for name in element.attributes if name.startswith("on")}
        assert set(element.attributes) <= allowed | {"width", "height"}


def test_a_config_that_leads_elsewhere_is_not_shown(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "comparison", seeds=1, domains=2)
    secret = tmp_path / "secret"
    secret.write_text("hidden: away")
    (folder / "seed_1" / "config.yaml").unlink()
    (folder / "seed_1" / "config.yaml").symlink_to(secret)
    assert "hidden: away" not in build(folder)


def test_many_domains_are_shown_in_part_and_said_so(tmp_path: Path) -> None:
    made = plain_rows()
    for row in made:
        row["domains"] = {f"place {n}": {"accuracy": 0.5 + n / 1000} for n in range(200)}
    part = section(read(build(write_rows(tmp_path, made))), "domains")
    assert "The first 30 of 200 domains" in part.text
    assert len(table(part)[1]) == 200


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-300, 1e14])
def test_any_numbers_can_be_drawn(tmp_path: Path, value: float) -> None:
    made = [{**row, "domains": {"a": {"accuracy": value}, "b": {"accuracy": -value}}, "mean": 0.0} for row in plain_rows()]
    made += [{**row, "support_size": size} for row in made for size in (0, 8)]
    text = build(write_rows(tmp_path, made))
    assert not re.search(r"\b(nan|inf)\b", text)


def test_domains_and_means_may_be_unknown(tmp_path: Path) -> None:
    made = [{**row, "domains": {"a": {"accuracy": None}}, "mean": None, "worst": None} for row in plain_rows()]
    page = read(build(write_rows(tmp_path, made)))
    assert table(section(page, "methods"))[1]["adapted"] == [MISSING, MISSING]
    assert read(build(write_rows(tmp_path, [{**row, "domains": {}} for row in made])))


def test_the_command_writes_the_page_beside_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path, plain_rows())
    main([str(tmp_path)])
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == build(tmp_path)
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_without_results_is_one_line_and_status_2_and_torch_is_not_needed(tmp_path: Path) -> None:
    write_rows(tmp_path / "full", plain_rows())
    code = "import sys\nfrom dmoe.report.__main__ import main\nmain(sys.argv[1:])\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "full")], cwd=ROOT, check=True, capture_output=True, timeout=60)
    ended = subprocess.run(
        [sys.executable, "-m", "dmoe.report", str(tmp_path / "none")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"error: .*none/results\.jsonl: cannot be read: No such file or directory: run\.py .*\n", ended.stderr)


@pytest.mark.parametrize("arguments", [[], ["folder", "--readme"]])
def test_either_a_folder_or_the_readme(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="either a FOLDER or --readme"):
        main(arguments)
