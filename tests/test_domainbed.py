"""Leaving out each domain in turn: which runs are started, what is read from them, and the table."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from told import one_line

from dmoe import domainbed
from dmoe.compare.tasks import Task
from dmoe.config import CONFIG_FOLDER, load_config
from dmoe.data.base import DomainSplit
from dmoe.data.files import ImageFiles
from dmoe.data.registry import load_dataset
from dmoe.domainbed import Cell, command, domains_of, leave_out, tables
from dmoe.errors import UserError
from scripts.make_folder_sample import write_sample

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("art", "photo", "sketch")


def row(method: str, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """A line of results.jsonl."""
    return {
        "method": method,
        "split": "target",
        "seed": 1,
        "metric": "accuracy",
        "reported": {"accuracy": "accuracy"},
        "mean": accuracy,
        "worst": accuracy,
        "overall": {"accuracy": accuracy},
        "domains": {},
        **changes,
    }


def write(folder: Path, *rows: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def cells(table: str) -> list[list[str]]:
    """The cells of a table in markdown, without the rule."""
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for domain in DOMAINS:
        for name in ("cat", "dog"):
            path = tmp_path / "pictures" / domain / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (8, 8)).save(path)
    return tmp_path / "pictures"


class Runs:
    """Stands in for the processes: records what they would be, writes a result for each, and fails where it is told to."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.failing: set[str] = set()

    def __call__(self, tasks: Mapping[str, Task], *, at_once: int, logs: Path, name: str) -> None:
        for task in tasks.values():
            words = list(task.arguments)
            self.commands.append(words)
            folder, seed = Path(words[words.index("--run_dir") + 1]), int(words[words.index("--seed") + 1])
            if f"{folder.parent.name}/{folder.name}" not in self.failing:
                write(folder, row("adapted", 0.5 + 0.1 * DOMAINS.index(folder.parent.name) + 0.02 * seed, seed=seed))
        if self.failing:
            raise UserError("domainbed: some tasks failed")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(domainbed, "run_tasks", made)
    return made


def leave(pictures: Path, out: Path, *overrides: str, seeds: Sequence[int] = (0, 1)) -> None:
    words = [*overrides, f"data.dir={pictures}"]
    config = load_config(CONFIG_FOLDER / "folders.yaml", words)
    leave_out(out, config, seeds, run=["run.py", "--threads", "1"], overrides=words, at_once=2)


def test_each_domain_is_left_out_with_each_seed(pictures: Path, tmp_path: Path, runs: Runs) -> None:
    out = tmp_path / "out"
    leave(pictures, out, "meta.inner_lr=0.1")
    expected = [
        [
            *("run.py", "--threads", "1", "--run_dir", str(out / domain / f"seed_{seed}"), "--seed", str(seed)),
            *("data.validation_domains=[]", "data.validation_fraction=0.2", "meta.inner_lr=0.1", f"data.dir={pictures}"),
            *(f'data.target_domains=["{domain}"]', f"data.seed={seed}"),
        ]
        for domain in DOMAINS
        for seed in (0, 1)
    ]
    assert runs.commands == expected


def test_the_splits_are_those_of_the_protocol(pictures: Path) -> None:
    """The other domains' images, of each a fifth drawn by the seed; and all of the one that is left out."""
    for domain, name, number in [(d, n, i) for d in DOMAINS for n in ("cat", "dog") for i in range(1, 5)]:
        Image.new("L", (8, 8)).save(pictures / domain / name / f"{number}.png")

    def opened(seed: int) -> dict[str, list[tuple[str, str]]]:
        words = command(Cell("photo", seed), Path("out"), run=[], overrides=[])
        config = load_config(CONFIG_FOLDER / "folders.yaml", words[4:])
        splits = load_dataset("folders", config.data.model_copy(update={"dir": pictures, "decoded_gb": 0.0})).splits
        return {name: _listed(split) for name, split in splits.items()}

    one, other = opened(0), opened(1)
    assert {domain for domain, _ in one["target"]} == {"photo"} and len(one["target"]) == 10
    for found in (one, other):
        assert [domain for domain, _ in found["validation"]] == ["art"] * 2 + ["sketch"] * 2
        assert not set(found["validation"]) & set(found["source"])
        assert len(found["source"]) == 16
    assert one["validation"] != other["validation"]
    assert opened(0) == one


def _listed(split: DomainSplit) -> list[tuple[str, str]]:
    paths = map(os.fsdecode, cast(ImageFiles, split)._paths)
    return [(split.domain_names[int(domain)], path) for domain, path in zip(split.domains, paths, strict=True)]


def test_target_domains_are_those_that_are_left_out(pictures: Path, tmp_path: Path, runs: Runs) -> None:
    leave(pictures, tmp_path / "out", "data.target_domains=[sketch, art]", seeds=[3])
    assert [words[-2] for words in runs.commands] == ['data.target_domains=["sketch"]', 'data.target_domains=["art"]']


def test_the_table_comes_last_and_rows_are_kept(
    pictures: Path, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(pictures, tmp_path / "out")
    assert cells(capsys.readouterr().out) == [
        ["accuracy in percent", "art", "photo", "sketch", "mean"],
        ["adapted", "51.0 ± 1.0", "61.0 ± 1.0", "71.0 ± 1.0", "61.0 ± 1.0"],
    ]
    kept = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(one["left_out"], one["seed"], one["method"]) for one in kept] == [(d, s, "adapted") for d in DOMAINS for s in (0, 1)]


def test_what_failed_is_told_and_what_is_finished_is_kept(
    pictures: Path, tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.failing = {"photo/seed_1"}
    with pytest.raises(UserError, match="some tasks failed"):
        leave(pictures, tmp_path / "out", seeds=[1])
    assert cells(capsys.readouterr().out)[1] == ["adapted", "52.0", "-", "72.0", "-"]


def test_rows_are_methods_and_the_mean_is_over_domains_seed_by_seed() -> None:
    values = {("art", 1): 0.1, ("art", 2): 0.3, ("photo", 1): 0.5, ("photo", 2): 0.5}
    results = {
        Cell(domain, seed): {"ERM student": row("ERM student", value / 2), "adapted": row("adapted", value)}
        for (domain, seed), value in values.items()
    }
    text = tables(results, domains=["art", "photo"])
    assert cells(text) == [
        ["accuracy in percent", "art", "photo", "mean"],
        ["ERM student", "10.0 ± 5.0", "25.0 ± 0.0", "17.5 ± 2.5"],
        ["adapted", "20.0 ± 10.0", "50.0 ± 0.0", "35.0 ± 5.0"],
    ]
    assert text.endswith("Mean ± standard error over seeds 1, 2.")


def test_a_seed_that_lacks_a_domain_is_left_out_of_the_mean() -> None:
    values = {("art", 1): 0.1, ("art", 2): 0.3, ("photo", 2): 0.5}
    results = {Cell(*key): {"adapted": row("adapted", value)} for key, value in values.items()}
    assert cells(tables(results, domains=["art", "photo"]))[1] == ["adapted", "20.0 ± 10.0", "50.0", "40.0"]


def test_every_reported_metric_has_a_table() -> None:
    reported = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    rows = {"adapted": row("adapted", 0.5, reported=reported, overall={"accuracy": 0.5, "macro_f1": 0.25})}
    found = cells(tables({Cell("art", 1): rows}, domains=["art"]))
    assert found == [
        *(["accuracy in percent", "art", "mean"], ["adapted", "50.0", "50.0"]),
        *(["macro F1 in percent", "art", "mean"], ["adapted", "25.0", "25.0"]),
    ]


def test_metrics_of_values_are_not_in_percent_and_may_be_undefined() -> None:
    reported = {"r": "r", "mse": "mean squared error"}
    rows = {"adapted": row("adapted", None, metric="r", reported=reported, overall={"r": None, "mse": 12.5})}
    assert cells(tables({Cell("art", 1): rows}, domains=["art"])) == [
        *(["r", "art", "mean"], ["adapted", "-", "-"]),
        *(["mean squared error", "art", "mean"], ["adapted", "12.500", "12.500"]),
    ]


@pytest.mark.parametrize(
    ("domain", "name"),
    [("Real World", "Real World"), ("a/b", "a%2Fb"), ("a%2Fb", "a%252Fb"), ("..", "%2E."), (".hidden", "%2Ehidden")],
)
def test_every_domain_has_a_folder_of_its_own_below_out(domain: str, name: str) -> None:
    assert Cell(domain, 3).folder(Path("out")) == Path("out") / name / "seed_3"


@pytest.mark.parametrize("name", ["no", "007", "a: b, c", "Größe", '"quoted"'])
def test_a_domain_reaches_the_configuration_under_its_own_name(name: str) -> None:
    words = command(Cell(name, 1), Path("out"), run=[], overrides=[])
    assert load_config(CONFIG_FOLDER / "folders.yaml", words[4:]).data.target_domains == (name,)


def test_a_table_with_splits_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("path,label,domain,split\na.png,cat,a,train\n")
    with pytest.raises(UserError, match="its column split says what is tested on"):
        domains_of(tmp_path / "images.csv")


def test_one_domain_cannot_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("path,label,domain\na.png,cat,a\n")
    with pytest.raises(UserError, match="holds one domain, a"):
        domains_of(tmp_path / "images.csv")


def test_an_unknown_domain_and_one_without_images_are_told(pictures: Path) -> None:
    with pytest.raises(UserError, match=r"'photos' is no domain of .*; it holds art, photo, sketch") as error:
        domains_of(pictures, ["photos"])
    assert one_line(error)
    (pictures / "painting" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"painting: a domain without images") as error:
        domains_of(pictures)
    assert one_line(error)


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "run.py", "--gpu", "-1", "--threads", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dataset", "folders", "--data_dir", "nowhere"], "nowhere: no such folder"),
        ([], "domainbed leaves out domains of --dataset folders, this is digits"),
        (["--dataset", "folders", "--dry_run"], "--protocol: it makes whole runs"),
        (["--dataset", "folders", "--compare"], "--compare: it does not go with --protocol"),
        (["--dataset", "folders", "--seeds", "1", "1"], "--seeds whole numbers, each once"),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(tmp_path: Path, words: list[str], told: str) -> None:
    done = _run("--protocol", "domainbed", "--run_dir", str(tmp_path / "out"), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_networks_trained_alone_leave_out_one_domain_and_go_on_with_the_others(tmp_path: Path) -> None:
    write_sample(tmp_path / "all", images_per_class=6)
    for angle in ("030", "060", "120"):
        shutil.copytree(tmp_path / "all" / f"{angle}_degrees", tmp_path / "three" / angle)
    words = ["--dataset", "folders", "--config", "configs/small_pictures.yaml", "--data_dir", str(tmp_path / "three")]
    words += ["--run_dir", str(tmp_path / "out"), "--method", "erm", "--protocol", "domainbed", "--processes", "2"]
    words += ["student.training.duration=8 steps", "student.objective.name=coral"]
    for more, left_out in ((["data.target_domains=['030']"], ["030"]), ([], ["030", "060", "120"])):
        done = _run(*words, *more)
        assert done.returncode == 0, done.stderr
        head, (method, *values) = cells(done.stdout)[:2]
        assert head == ["accuracy in percent", *left_out, "mean"]
        assert method == "CORAL" and all(0 <= float(value) <= 100 for value in values)
        kept = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
        assert [(one["left_out"], list(one["domains"])) for one in kept] == [(domain, [domain]) for domain in left_out]
    log = (tmp_path / "out" / "logs" / "030_seed_1.txt").read_text()
    assert log.count("student: already finished from the same inputs") == 1
