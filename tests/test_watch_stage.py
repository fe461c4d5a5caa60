"""Ranges of training episodes: what they are measured on, where they lie, and when they are made again. A real run, very small."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import noise
import pytest
import torch
from noise import steady_run_in, train
from told import one_line
from torch import Tensor

import dmoe
from dmoe import stages
from dmoe.artifacts import load_tensors, read_json, save_tensors, write_json
from dmoe.diagnosis import learned_ranges, summaries
from dmoe.errors import UserError
from dmoe.model import Model, load_as
from dmoe.run import Run
from dmoe.tasks import TaskKind
from dmoe.tokens import TokenStore
from dmoe.watch_stage import batches_of, measure_ranges

SUPPORT = 8
SETTINGS = ["meta.gradient=double_backward", "meta.inner_lr=0.05", f"meta.support_size={SUPPORT}"]


def run_in(folder: Path, *overrides: str, kind: TaskKind = "multiclass") -> Run:
    return steady_run_in(folder, *SETTINGS, *overrides, kind=kind)


def tokens_of(run: Run) -> dict[str, TokenStore]:
    return stages.make_tokens(run, stages.load_experts(run))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch") / "run"
    train(run_in(folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Iterator[Run]:
    shutil.copytree(trained, tmp_path / "run")
    yield run_in(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")


@pytest.fixture
def measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Mapping[str, float]]]:
    """Images, tokens and statistics of each batch that is measured."""
    seen: list[tuple[Tensor, Tensor, Mapping[str, float]]] = []
    measure = Model.measure

    def noted(self: Model, images: Tensor, *, tokens: Tensor | None = None) -> Mapping[str, float]:
        assert tokens is not None
        seen.append((images, tokens, measure(self, images, tokens=tokens)))
        return seen[-1][2]

    monkeypatch.setattr(Model, "measure", noted)
    return seen


def test_a_run_without_ranges_is_loaded_and_suspects_nothing(run: Run) -> None:
    model = dmoe.load(run.folder.path)
    assert model.ranges is None
    assert not model.adapt(torch.full((1, 1, 4, 4), 1e6)).diagnosis.suspect


def test_a_loaded_model_judges_by_the_ranges_that_were_measured(run: Run, measured: list[Any]) -> None:
    measure_ranges(run, tokens_of(run))
    model = dmoe.load(run.folder.path)
    assert model.ranges is not None and model.ranges.images == SUPPORT
    source, validation = ([m[2] for m in measured if m[1].shape[1] == experts] for experts in (1, 2))
    assert (len(source), len(validation)) == (5 * 2, 3 * 1), "whole batches of 20 and of 10 images a domain"
    expected = learned_ranges(
        [
            summaries({number: source[2 * number : 2 * number + 2] for number in range(5)}),
            summaries({number: validation[number : number + 1] for number in range(3)}),
        ],
        images=SUPPORT,
    )
    assert model.ranges == expected
    assert set(expected.by_name) == set(source[0])
    for _, _, statistics in measured:
        assert not model.ranges.judged(statistics, images=SUPPORT).suspect
    with pytest.warns(dmoe.SuspectAdaptation, match="images: 1, training episodes 8"):
        assert model.adapt(torch.rand(1, 1, 4, 4)).diagnosis.suspect


def test_source_batches_are_seen_as_in_episodes_and_validation_batches_as_in_tests(run: Run, measured: list[Any]) -> None:
    tokens = tokens_of(run)
    measure_ranges(run, tokens)
    model = load_as(run.folder, run.config, device="cpu")
    for images, said, _ in measured:
        every = model.experts(images)
        assert images.shape == (SUPPORT, 1, 4, 4)
        domain = int((images.mean(dim=(1, 2, 3)).mean() - 0.5).mul(10).round())
        if domain >= 10:
            torch.testing.assert_close(said, every, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(said[:, 0], every[:, 1 - noise.GROUPS[domain]], rtol=1e-4, atol=1e-5)


def test_ranges_are_measured_once(run: Run, measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tokens_of(run)
    measure_ranges(run, tokens)
    assert "diagnosis: ranges of 6 statistics from 10 batches of 5 source domains, 3 batches of 3" in capsys.readouterr().out
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run.folder.path / "diagnosis").glob("*.json")}
    count = len(measured)
    measure_ranges(run, tokens)
    assert "diagnosis: already finished from the same inputs" in capsys.readouterr().out
    assert len(measured) == count
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_the_same_run_has_the_same_ranges(run: Run) -> None:
    tokens = tokens_of(run)
    measure_ranges(run, tokens)
    path = run.folder.path / "diagnosis" / "ranges.json"
    before = path.read_bytes()
    shutil.rmtree(path.parent)
    measure_ranges(run, tokens)
    assert path.read_bytes() == before


def test_another_support_size_and_a_damaged_file_are_measured_again(run: Run) -> None:
    tokens = tokens_of(run)
    measure_ranges(run, tokens)
    other = run_in(run.folder.path, "evaluation.support_size=5")
    measure_ranges(other, tokens)
    ranges = dmoe.load(run.folder.path).ranges
    assert ranges is not None and ranges.images == 5
    path = run.folder.path / "diagnosis" / "ranges.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError) as caught:
        dmoe.load(run.folder.path)
    assert str(path) in one_line(caught)
    measure_ranges(other, tokens)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("support", "batches"), [(11, 5), (21, 0)])
def test_domains_with_fewer_images_than_a_batch_tell_nothing(run: Run, measured: list[Any], support: int, batches: int) -> None:
    measure_ranges(run_in(run.folder.path, f"evaluation.support_size={support}"), tokens_of(run))
    assert len(measured) == batches, "source domains have 20 images, validation domains 10"
    model = dmoe.load(run.folder.path)
    assert (model.ranges is None) == (batches == 0)
    if batches == 0:
        assert str(model.adapt(torch.rand(1, 1, 4, 4)).diagnosis) == str(dmoe.Diagnosis())


@pytest.mark.parametrize("content", [{}, {"images": 8, "ranges": {}}, {"images": 8, "ranges": {"a": 3}, "made_from": {"meta": {}}}])
def test_a_file_that_holds_no_ranges_is_refused_by_name(run: Run, content: dict[str, Any]) -> None:
    path = run.folder.path / "diagnosis" / "ranges.json"
    write_json(path, content)
    with pytest.raises(UserError) as caught:
        dmoe.load(run.folder.path)
    assert one_line(caught).startswith(f"{path}: damaged")


def test_ranges_of_other_weights_or_of_another_way_to_normalise_are_not_gone_by(run: Run) -> None:
    measure_ranges(run, tokens_of(run))
    by_batch = run_in(run.folder.path, "evaluation.expert_batch_norm=batch").config
    assert load_as(run.folder, run.config, device="cpu").ranges is not None
    assert load_as(run.folder, by_batch, device="cpu").ranges is None
    stage = run.folder.stage("meta", read_json(run.folder.path / "meta" / "manifest.json")["inputs"])
    tensors = load_tensors(stage.weights)[0]
    save_tensors(stage.weights, {name: tensor + 1 for name, tensor in tensors.items()})
    stage.finish(files=[stage.weights], figures={})
    assert dmoe.load(run.folder.path).ranges is None


def test_what_to_do_with_a_suspect_is_configured(run: Run) -> None:
    measure_ranges(run, tokens_of(run))
    config = run_in(run.folder.path, "evaluation.on_suspect=fall_back").config
    model, odd = load_as(run.folder, config, device="cpu"), torch.full((1, 1, 4, 4), 5.0)
    adapted = model.adapt(odd)
    assert adapted.diagnosis.suspect
    assert torch.equal(adapted.logits(odd), model.student.logits(odd))


@pytest.mark.parametrize(("kind", "first"), [("binary", "spread of predictions"), ("regression", "spread of values")])
def test_other_tasks_are_watched_too(tmp_path: Path, kind: TaskKind, first: str) -> None:
    run = run_in(tmp_path / "run", kind=kind)
    train(run)
    measure_ranges(run, tokens_of(run))
    model = dmoe.load(run.folder.path)
    assert model.ranges is not None
    assert next(iter(model.ranges.by_name)) == first
    assert ("entropy of predictions" in model.ranges.by_name) == (kind == "binary")
    with pytest.warns(dmoe.SuspectAdaptation, match=f"suspect: .*images: 1, training episodes {SUPPORT}"):
        model.adapt(torch.rand(1, 1, 4, 4))


# Batches


def test_batches_are_whole_of_one_domain_and_share_no_image() -> None:
    split = noise.Noise(103, first=4, domains=5, kind="multiclass")
    drawn = batches_of(split, size=6, key=("a",))
    assert {domain: sum(d == domain for d, _ in drawn) for domain in split.members} == dict.fromkeys(split.members, 3)
    assert all(len(index) == 6 and set(split.domains[index].tolist()) == {domain} for domain, index in drawn)
    together = torch.cat([index for _, index in drawn])
    assert len(together.unique()) == len(together)
    again, other = batches_of(split, size=6, key=("a",)), batches_of(split, size=6, key=("b",))
    assert all(torch.equal(one[1], same[1]) for one, same in zip(drawn, again, strict=True))
    assert not all(torch.equal(one[1], same[1]) for one, same in zip(drawn, other, strict=True))


def test_small_domains_are_left_out_and_of_many_some_are_drawn() -> None:
    few = noise.Noise(8, first=0, domains=3, kind="multiclass")  # 3, 3 and 2 images
    assert {domain for domain, _ in batches_of(few, size=3, key=())} == {0, 1}
    assert batches_of(few, size=4, key=()) == []
    many = batches_of(noise.Noise(3000, first=0, domains=300, kind="multiclass"), size=2, key=())
    assert (len(many), len({domain for domain, _ in many})) == (100, 50)
    assert len(batches_of(noise.Noise(3000, first=0, domains=3, kind="multiclass"), size=2, key=())) == 3 * 8
