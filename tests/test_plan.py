"""The plan: how much disk, how many steps, how long by given costs, and that making it changes nothing."""

import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from noise import run_in
from told import names, one_line
from torch import nn

from dmoe import plan
from dmoe.data.decoded import DecodedImages, Keeping
from dmoe.data.transforms import ImageTransform
from dmoe.errors import UserError
from dmoe.model import build_aggregator
from dmoe.plan import Costs, entries, measure, show, token_bytes
from dmoe.run import Run
from dmoe.tasks import TaskKind
from dmoe.tokens import TOKENS

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["experts", "tokens", "aggregator", "student", "meta", "diagnosis", "test"]
FREE = Costs(read=0, forward=0, train=0, aggregate=0, meta=0)


def seconds(run: Run, **costs: float) -> dict[str, float]:
    """Of each stage, where only the named things cost anything."""
    return {entry.stage: entry.seconds for entry in entries(run, dataclasses.replace(FREE, **costs))}


def by_stage(*values: float) -> dict[str, float]:
    return dict(zip(STAGES, values, strict=True))


# Disk


@pytest.mark.parametrize(("views", "overrides", "stored"), [(1, [], 1), (8, [], 8), (8, ["tokens.views=first"], 1)])
def test_tokens_take_four_bytes_a_number(tmp_path: Path, views: int, overrides: list[str], stored: int) -> None:
    run = run_in(tmp_path, *overrides, views=views)
    assert token_bytes(run, width=64) == (100 * stored + 30) * 2 * 64 * 4


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Costs:
    """Costs that are given and not measured."""
    costs = Costs(read=1, forward=2, train=3, aggregate=5, meta=7)
    monkeypatch.setattr(plan, "measure", lambda *_: costs)
    return costs


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, measured: Costs) -> Callable[[int], None]:
    """Sets how many bytes are free."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, 10**12 - count, count))

    return set_free


@pytest.mark.parametrize(
    ("views", "way"),
    [
        (1, "choose another --run_dir, or tokens.storage=float16"),
        (8, "--run_dir, or tokens.views=first, or tokens.storage=float16"),
    ],
)
def test_disk_that_is_too_small_is_told(tmp_path: Path, disk: Callable[[int], None], views: int, way: str) -> None:
    run = run_in(tmp_path / "run", views=views)
    needed = token_bytes(run, width=64)
    disk(needed - 1)
    with pytest.raises(UserError) as caught:
        show(run)
    message = one_line(caught)
    assert message.startswith(f"{tmp_path / 'run'}: the tokens need {needed / 1e6:.1f} MB, the disk has ")
    assert message.endswith(way)
    disk(needed)
    show(run)
    assert names(tmp_path) == []


def test_tokens_that_are_there_need_no_more_disk(tmp_path: Path, disk: Callable[[int], None]) -> None:
    (tmp_path / "tokens" / "source").mkdir(parents=True)
    (tmp_path / "tokens" / "source" / TOKENS).touch()
    disk(0)
    show(run_in(tmp_path))


# Time


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        # 3 epochs of 6 batches, and of 4, of 10 images; 7 batches of 25; in meta 3 checks, each adapting 3 domains to 8 images
        # by 2 passes through the student; ranges come of 2 batches of each source domain and 1 of each validation domain
        ("train", by_stage(18 * 10 + 12 * 10, 0, 0, 7 * 25, 3 * 3 * 8 * 2, 13 * 8 * 2, 5 * 8 * 2)),
        # 3 checks of each expert and of the student, on 30 images; adapting asks 2 experts; a test is 4 passes over 50 images
        (
            "forward",
            by_stage(2 * 3 * 30, 130 * 2, 0, 3 * 30, 3 * (30 + 3 * 8 * 2), 13 * 8, 4 * 50 + 5 * 8 * 2),
        ),
        # 2 epochs of 5 batches, 2 checks
        ("aggregate", by_stage(0, 0, 10 + 2, 0, 0, 0, 0)),
        # 2 epochs of 100 // 30 updates of 2 episodes
        ("meta", by_stage(0, 0, 0, 0, 6 * 2 * 15, 0, 0)),
        ("read", by_stage(300 + 180, 130, 0, 175 + 90, 6 * 2 * 15 + 3 * 30, 13 * 8, 4 * 50)),
    ],
)
def test_each_stage_takes_its_steps_times_their_cost(tmp_path: Path, cost: str, expected: dict[str, float]) -> None:
    assert seconds(run_in(tmp_path), **{cost: 1.0}) == expected


@pytest.mark.parametrize(
    ("overrides", "stage", "steps", "checks"),
    [
        (["student.training.duration=4 epochs"], "student", 16, 6),
        (["student.training.duration=2.5 epochs"], "student", 10, 4),
        (["student.training.duration=1 steps"], "student", 1, 1),
        (["student.training.duration=0 steps"], "student", 0, 0),
        (["student.training.evaluate_every=0 steps"], "student", 7, 1),
        (["student.training.evaluate_every=7 steps"], "student", 7, 1),
        (["student.training.evaluate_every=6 steps"], "student", 7, 2),
        (["student.training.batch_size=200", "student.training.duration=3 epochs"], "student", 3, 1),
    ],
)
def test_steps_and_checks_are_those_that_the_duration_says(
    tmp_path: Path, overrides: list[str], stage: str, steps: int, checks: int
) -> None:
    run = run_in(tmp_path, *overrides)
    images = min(run.config.student.training.batch_size, 100)
    assert seconds(run, train=1)[stage] == steps * images
    assert seconds(run, forward=1)[stage] == checks * 30


def test_more_views_are_more_tokens_and_nothing_else(tmp_path: Path) -> None:
    one, eight = (seconds(run_in(tmp_path, views=views), forward=1, train=1, meta=1) for views in (1, 8))
    assert {stage for stage in STAGES if one[stage] != eight[stage]} == {"tokens"}
    assert eight["tokens"] == (8 * 100 + 30) * 2


def test_smaller_support_of_the_test_is_counted(tmp_path: Path) -> None:
    found = seconds(run_in(tmp_path, "evaluation.support_size=3"), train=1)
    assert found["test"] == 5 * 3 * 2


def test_time_scales_with_the_costs(tmp_path: Path) -> None:
    run, costs = run_in(tmp_path), {"read": 0.5, "forward": 0.25, "train": 3.0, "aggregate": 0.125, "meta": 8.0}
    once, twice = seconds(run, **costs), seconds(run, **{name: 2 * value for name, value in costs.items()})
    assert min(once.values()) > 0
    assert twice == {stage: 2 * value for stage, value in once.items()}


def test_reading_and_computing_go_on_at_once(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert seconds(run, read=2, meta=3)["meta"] - seconds(run, read=2)["meta"] == 6 * 2 * 15


def finish(run: Run, stage: str) -> None:
    manifest = run.folder.path / stage / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")


@pytest.mark.parametrize("stage", ["tokens", "aggregator", "student", "meta"])
def test_finished_stage_takes_no_time_and_the_others_what_they_took(tmp_path: Path, stage: str) -> None:
    costs = {"read": 1.0, "forward": 1.0, "train": 1.0, "aggregate": 1.0, "meta": 1.0}
    run = run_in(tmp_path)
    before = seconds(run, **costs)
    finish(run, "tokens/source" if stage == "tokens" else stage)
    assert seconds(run, **costs) == {**before, stage: 0.0}


def test_finished_experts_are_left_out(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    finish(run, "experts/expert_00")
    assert seconds(run, train=1)["experts"] == 12 * 10
    assert entries(run, FREE)[0].work.startswith("1 of 2,")
    finish(run, "experts/expert_01")
    assert seconds(run, train=1)["experts"] == 0


def test_work_is_said_in_steps_and_images(tmp_path: Path) -> None:
    work = {entry.stage: entry.work for entry in entries(run_in(tmp_path), FREE)}
    assert work == {
        "experts": "2 of 2, 3 epochs of batches of 10",
        "tokens": "130 images through 2 experts",
        "aggregator": "2 epochs of batches of 20, from tokens",
        "student": "7 steps of batches of 25",
        "meta": "6 updates of 2 x 8 + 7 images",
        "diagnosis": "13 batches of 8 images adapted to, from tokens",
        "test": "50 images of 5 domains",
    }


# The screen


def shown(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show(run)
    return capsys.readouterr().out


@pytest.mark.usefixtures("measured")
def test_plan_is_one_screen_that_names_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path / "run", "seed=5")
    text = shown(run, capsys)
    lines = text.splitlines()
    assert len(lines) < 25
    assert lines[0].startswith("noise, seed 5, on cpu with 1 CPU threads; ")
    assert lines[0].endswith(str(tmp_path / "run"))
    for split, images, domains in (("source", 100, 5), ("validation", 30, 3), ("target", 50, 5)):
        assert [split, str(images), "images", str(domains), "domains"] in [line.split() for line in lines]
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 64 + 64 * 64)
    norms = 2 * (16 + 32 + 64 + 64)
    network = convolutions + norms + 64 * 64 + 64 + 64 * 3 + 3
    assert f"2 experts small_conv, {network / 1e6:.2f} M parameters each" in text
    aggregator = build_aggregator(run.config.aggregator, width=64, num_outputs=3)
    assert f"aggregator {sum(p.numel() for p in aggregator.parameters()) / 1e6:.2f} M;" in text
    assert f"student small_conv, {network / 1e6:.2f} M; features 64 wide" in text
    assert "tokens take 0.1 MB" in text and "are free on that disk" in text


def test_plan_says_where_decoded_images_are_kept_and_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path / "run")
    assert "decoded images" not in shown(run, capsys)
    transform, paths = ImageTransform((3, 100, 100)), [f"{number}.png" for number in range(1000)]
    decoded = DecodedImages(Keeping(tmp_path / "kept", limit=10**9), root=tmp_path, paths=paths, transform=transform)
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, decoded=decoded))
    assert f"  decoded images are kept in {tmp_path / 'kept'}, up to 30.0 MB; 0.0 MB are there" in shown(run, capsys)


def test_plan_ends_with_the_sum_of_the_stages(tmp_path: Path, measured: Costs, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path)
    lines = shown(run, capsys).splitlines()
    total = sum(entry.seconds for entry in entries(run, measured))
    assert 2 * 60 <= total < 2 * 3600
    assert lines[-2].split() == ["in", "all,", "about", f"{total / 60:.1f}", "min"]
    assert [line.split()[0] for line in lines[-9:-2]] == STAGES


@pytest.mark.usefixtures("measured")
def test_plan_says_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path)
    finish(run, "student")
    finished = [line.split()[0] for line in shown(run, capsys).splitlines() if line.endswith("finished")]
    assert finished == ["student"]


@pytest.mark.usefixtures("measured")
def test_plan_says_that_experts_share_groups_of_finer_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in(tmp_path)
    run.source.domains = torch.arange(100) % 20
    assert "20 domains of 5 groups, which the experts share" in shown(run, capsys)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (9000, "2.5 hours"), (86400 * 3.5, "3.5 days")]
)
@pytest.mark.usefixtures("measured")
def test_long_times_are_said_in_large_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: float, text: str
) -> None:
    monkeypatch.setattr(plan, "entries", lambda *_: [plan.Entry("all", "everything", count)])
    assert shown(run_in(tmp_path), capsys).splitlines()[-2].endswith(f" {text}")


# Measuring


def copies(*modules: nn.Module) -> list[dict[str, Any]]:
    return [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]


@pytest.mark.parametrize("method", ["forward_over_reverse", "double_backward"])
@pytest.mark.parametrize("kind", ["multiclass", "binary", "regression"])
def test_measuring_changes_no_weights_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TaskKind, method: str
) -> None:
    monkeypatch.setattr(plan, "SECONDS_A_MEASUREMENT", 0.0)
    run = run_in(tmp_path / "run", f"meta.gradient={method}", kind=kind)
    expert, student = (run.network(run.config.experts.backbone, key, to_train=False) for key in ("expert", "student"))
    outputs = run.dataset.task.num_outputs
    aggregator = build_aggregator(run.config.aggregator, width=expert.width, num_outputs=outputs)
    before = copies(expert, student, aggregator)
    costs = measure(run, expert, student, aggregator)
    for old, new in zip(before, copies(expert, student, aggregator), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(math.isfinite(value) for value in dataclasses.astuple(costs))
    assert names(tmp_path) == []


def test_dry_run_says_the_plan_and_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tried"
    command = [sys.executable, "run.py", "--dry_run", "--run_dir", str(folder), "--gpu", "-1", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) < 25
    assert lines[0].startswith("digits, seed 1, on cpu with 1 CPU threads")
    assert lines[0].endswith(str(folder))
    assert "6 experts small_conv" in done.stdout and "72,000 images" in done.stdout
    assert "in all, about" in done.stdout
    assert names(tmp_path) == []
