"""Processes that work together: what they share out, add up, and tell each other."""

import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dmoe.artifacts import read_json
from dmoe.config import Duration, MetaConfig, OptimizerConfig
from dmoe.console import say
from dmoe.data.base import DomainSplit
from dmoe.diagnosis import Diagnosis
from dmoe.distributed import ALONE, World, folded, joined
from dmoe.evaluation import evaluate
from dmoe.meta.learner import MetaLearner
from dmoe.meta.training import meta_train
from dmoe.models.aggregator import Aggregator
from dmoe.models.expert_pool import ExpertPool
from dmoe.models.networks import Network, SmallConv
from dmoe.protocols import Protocol
from dmoe.run_folder import Stage
from dmoe.tasks import Task
from dmoe.tokens import build_store

IMAGES, N, D, K = 40, 3, 8, 3


class Pictures(DomainSplit):
    """Five domains of eight random images."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)
        self._images = torch.randn(IMAGES, 1, 8, 8, generator=random, dtype=torch.float64).to(dtype)
        self.labels = torch.arange(IMAGES) % K
        self.domains = self.group_domains = torch.arange(5).repeat_interleave(8)
        self.domain_names = {}

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        return self._images[index]


def networks(dtype: torch.dtype = torch.float32) -> tuple[Network, Aggregator, ExpertPool]:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, D))
    student = Network(features=body, head=nn.Linear(D, K))
    aggregator = Aggregator(width=D, num_outputs=K, depth=1, heads=2, dropout=0.0)
    pool = ExpertPool(SmallConv(image_shape=(1, 8, 8), width=D) for _ in range(N))
    return student.to(dtype), aggregator.to(dtype), pool


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What ``work`` gives in each of so many processes, as torchrun would have started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(_member, work, size, port), range(size)))


def _member(work: Callable[[World], Any], size: int, port: int, rank: int) -> Any:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined() as world:
        return work(world)


def _everything(folder: Path, dtype: torch.dtype, world: World) -> dict[str, Any]:
    """Tokens, twenty meta-training steps and an evaluation, as this world shares them out."""
    split, (student, aggregator, pool) = Pictures(), networks()
    stage = Stage(folder / "tokens", {})
    device = torch.device("cpu")
    with patch("dmoe.tokens.BLOCK_IMAGES", 8):
        tokens = build_store(stage, split=split, pool=pool, width=D, batch_size=4, device=device, world=world)
    student, aggregator = student.to(dtype), aggregator.to(dtype)
    learner = MetaLearner(student=student, aggregator=aggregator, task=Task("multiclass", num_outputs=K), inner_lr=0.3)
    adam = OptimizerConfig(lr=0.01)
    settings = {"duration": Duration(20, "steps"), "support_size": 4, "query_size": 3, "inner_lr": 0.3}
    config = MetaConfig(domains_per_update=4, student=adam, aggregator=adam, **settings)
    scores = iter(range(100))
    progress = meta_train(
        stage=Stage(folder / "meta", {}),
        learner=learner,
        split=Pictures(dtype),
        tokens=_In(tokens, dtype),
        own_expert=split.domains % N,
        config=config,
        evaluate=lambda: float(next(scores)),
        checkpoint_every=7,
        seed=1,
        device=device,
        world=world,
    )
    weights = torch.cat([p.detach().flatten() for p in (*student.parameters(), *aggregator.parameters())])
    return {"weights": weights, "tokens": tokens[torch.arange(IMAGES)], "steps": progress.step}


class _In:
    """A store that gives its tokens in another type."""

    def __init__(self, store: Any, dtype: torch.dtype) -> None:
        self._store, self._dtype, self.views = store, dtype, 1

    def of_views(self, index: Tensor, view: Tensor) -> Tensor:
        return self._store.of_views(index, view).to(self._dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.float64), (3, torch.float64)])
def test_tokens_and_weights_do_not_depend_on_the_number_of_processes(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    alone = _everything(tmp_path / "alone", dtype, ALONE)
    found = together(size, partial(_everything, tmp_path / "together", dtype))
    start = torch.cat([p.detach().flatten() for part in networks(dtype)[:2] for p in part.parameters()])
    assert (alone["weights"] - start).norm() > 0.01 * start.norm()  # it has learned
    for each in found:
        assert torch.equal(each["tokens"], alone["tokens"]) and each["steps"] == 20
        if size == 3:  # no power of two: to rounding
            torch.testing.assert_close(each["weights"], alone["weights"], rtol=1e-10, atol=1e-11)
        else:
            assert torch.equal(each["weights"], alone["weights"])
    stages = [read_json(tmp_path / name / "tokens" / "manifest.json")["sha256"] for name in ("alone", "together")]
    assert stages[0] == stages[1]


def _small_things(world: World) -> dict[str, Any]:
    sums = [torch.tensor([1.0 + world.rank]), torch.full((2, 2), 10.0 * world.rank)]
    world.add_up(sums)
    first = [torch.tensor([world.rank + 5]), torch.tensor([world.rank + 0.5])]
    world.spread(first)
    said = StringIO()
    with redirect_stdout(said):
        say("here")
    return {
        "sums": sums,
        "first": first,
        "share": world.share("abcdefg"),
        "any": [world.any(world.rank == 1), world.any(False)],
        "from first": world.from_first(lambda: {"rank": world.rank}),
        "gathered": world.gathered(world.rank * 11),
        "said": said.getvalue(),
        "torch": "torch" in sys.modules,
    }


@pytest.mark.parametrize("size", [2, 3])
def test_what_processes_tell_each_other(size: int) -> None:
    for rank, found in enumerate(together(size, _small_things)):
        total = size * (size - 1) / 2
        assert found["sums"][0].item() == size + total
        assert torch.equal(found["sums"][1], torch.full((2, 2), 10 * total))
        assert found["first"] == [torch.tensor([5]), torch.tensor([0.5])]
        assert found["share"] == list("abcdefg")[rank::size]
        assert found["any"] == [True, False]
        assert found["from first"] == {"rank": 0}
        assert found["gathered"] == [11 * other for other in range(size)]
        assert found["said"] == ("here\n" if rank == 0 else "")


def test_a_process_alone_needs_nobody() -> None:
    with joined() as world:
        assert world is ALONE
    sums = [torch.tensor([3.0])]
    world.add_up(sums)
    world.spread(sums)
    world.wait()
    assert sums[0].item() == 3.0
    assert (world.share([1, 2]), world.any(True), world.any(False)) == ([1, 2], True, False)
    assert (world.from_first(lambda: 7), world.gathered(8)) == (7, [8])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8]))
def test_sums_are_the_same_to_the_bit_however_they_are_shared_out(values: list[float], size: int) -> None:
    """Against adding up by hand what each of the processes has, pair by pair."""
    if len(values) < size:
        return

    def value(number: float) -> list[Tensor]:
        return [torch.tensor([number], dtype=torch.float32)]

    parts = [folded(World(rank, size).share(values), value)[0] for rank in range(size)]
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [parts[rank] + parts[rank + half] for rank in range(half)]
    assert torch.equal(parts[0], folded(values, value)[0])


class ByColour:
    """Adapts to nothing; tells images apart by their mean."""

    diagnosis = Diagnosis()

    def adapt(self, images: Tensor, *, start: Any = None) -> Any:
        return self

    def logits(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((images.mean((1, 2, 3)) > 0).long(), K).float()


def _evaluated(world: World) -> Tensor:
    from dmoe.data.base import DomainDataset
    from dmoe.data.transforms import ImageTransform

    dataset = DomainDataset(
        name="pictures",
        splits={"target": Pictures()},
        task=Task("multiclass", num_outputs=K),
        transform=ImageTransform((1, 8, 8), mean=(0.5,), std=(0.5,)),
        class_names=["a", "b", "c"],
        fingerprint="",
    )
    return evaluate(ByColour(), dataset, "target", Protocol(2), batch_size=3, world=world).predictions


def test_domains_of_an_evaluation_are_shared_out_and_all_predictions_come_back() -> None:
    alone = _evaluated(ALONE)
    assert 0 < alone.sum() < IMAGES
    for found in together(2, _evaluated):
        assert torch.equal(found, alone)
