"""Training in episodes: what a step is made of, what it minimises, and that being cut off does not change it."""

from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_arms import K, network
from torch import Tensor

from dmoe.artifacts import load_tensors
from dmoe.baselines.arm import Arm
from dmoe.baselines.arm_bn import ArmBn
from dmoe.baselines.arm_cml import ArmCml, ContextNetwork
from dmoe.baselines.arm_ll import ArmLl, LossNetwork
from dmoe.baselines.arm_training import EpisodeBatches, train_in_episodes
from dmoe.config import TrainingConfig
from dmoe.data.base import DomainSplit
from dmoe.errors import UserError
from dmoe.models.copying import private_copy
from dmoe.run_folder import Stage
from dmoe.tasks import Task

TASK = Task("multiclass", num_outputs=K)
TRAINING = {"batch_size": 6, "duration": "8 steps", "evaluate_every": "3 steps", "optimizer": {"lr": 0.02}}


class Domains(DomainSplit):
    """Random images of 6x6 in domains of these sizes; a draw adds noise of its own."""

    def __init__(self, *sizes: int) -> None:
        random = torch.Generator().manual_seed(1)
        self.domains = self.group_domains = torch.cat([torch.full((n,), domain) for domain, n in enumerate(sizes)])
        self.labels = torch.randint(K, (len(self.domains),), generator=random)
        self.domain_names = {domain: str(domain) for domain in range(len(sizes))}
        self._images = torch.randn(len(self.domains), 1, 6, 6, generator=random, dtype=torch.float64)

    def images(self, index: Tensor, *, view: Tensor | None = None, draw: int | None = None) -> Tensor:
        noise = torch.Generator().manual_seed(draw or 0)
        return self._images[index] + 0.1 * torch.randn(len(index), 1, 6, 6, generator=noise, dtype=torch.float64)


def arm(kind: str) -> Arm:
    torch.manual_seed(7)
    if kind == "bn":
        return ArmBn(network(), task=TASK)
    if kind == "ll":
        return ArmLl(network(), LossNetwork(num_outputs=K, width=6).double(), task=TASK, inner_lr=0.1)
    context = ContextNetwork(channels=1, context_channels=2, width=3, kernel_size=3).double()
    return ArmCml(network(channels=3), context, task=TASK)


class CutOffError(Exception):
    """Stands for a process that ends here."""


def train(
    folder: Path, made: Arm, *, cut_before: int = -1, steps: int = 8, domains: int = 2, lr: float = 0.02
) -> dict[str, Tensor]:
    split, passes, asked = Domains(12, 9, 15), count(), made.query_logits

    def query_logits(support: Tensor, query: list[Tensor]) -> Tensor:
        if next(passes) == cut_before:
            raise CutOffError
        return asked(support, query)

    def evaluate() -> float:
        said = made.adapt(split.images(torch.arange(5))).logits(split.images(torch.arange(12)))
        return -F.cross_entropy(said, split.labels[:12]).item()

    made.query_logits = query_logits  # type: ignore[method-assign]
    stage = Stage(folder, {})
    train_in_episodes(
        stage=stage,
        arm=made,
        split=split,
        task=TASK,
        training=TrainingConfig.model_validate({**TRAINING, "duration": f"{steps} steps", "optimizer": {"lr": lr}}),
        support_size=5,
        domains=domains,
        evaluate=evaluate,
        checkpoint_every=2,
        seed=3,
        device=torch.device("cpu"),
    )
    return load_tensors(stage.weights)[0]


def test_a_step_holds_episodes_of_one_domain_each_without_an_image_in_common() -> None:
    split = Domains(12, 9, 7)
    batches = EpisodeBatches(split, episodes=3, support_size=6, query_size=4, key=(1,))
    assert batches.steps_per_epoch == 1
    for step in range(20):
        support, query, labels, sizes = batches(step)
        index = batches.index(step)
        assert len(index) == len(support) + len(query) and len(support) == 18 and len(query) == len(labels) == sizes.sum()
        at = 0
        for size in sizes.tolist():
            episode = index[at : at + 6 + size]
            (domain,) = split.domains[episode].unique().tolist()
            assert len(episode.unique()) == 6 + size and size == min(4, len(split.members[domain]) - 6)
            at += len(episode)


def test_images_are_drawn_afresh_and_by_the_step() -> None:
    split = Domains(30)
    one, other = (EpisodeBatches(split, episodes=2, support_size=6, query_size=4, key=(1,)) for _ in "ab")
    other(0)
    assert all(torch.equal(a, b) for a, b in zip(one(5), other(5), strict=True))
    support, query, labels, _ = one(5)
    index = one.index(5)
    kept = torch.cat([index[:6], index[10:16]])
    assert torch.equal(labels, split.labels[torch.cat([index[6:10], index[16:]])])
    assert not torch.allclose(support, split.images(kept))
    noise = torch.cat([support, query]) - split._images[torch.cat([kept, index[6:10], index[16:]])]
    assert 0.08 < noise.std() < 0.12
    assert len(noise.flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("kind", ["cml", "bn", "ll"])
def test_a_step_is_adam_on_the_loss_of_the_query_after_adapting(tmp_path: Path, kind: str) -> None:
    made, split = arm(kind), Domains(12, 9, 15)
    support, query, labels, sizes = EpisodeBatches(split, episodes=2, support_size=5, query_size=3, key=(3, "arm"))(0)
    made.train()
    adam = torch.optim.Adam(made.parameters(), lr=0.02, fused=True)
    F.cross_entropy(made.query_logits(support.unflatten(0, (2, 5)), query.split(sizes.tolist())), labels).backward()
    adam.step()
    weights = train(tmp_path, arm(kind), steps=1)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(weights[f"model.{name}"], value)


@pytest.mark.parametrize("kind", ["cml", "bn", "ll"])
@pytest.mark.parametrize("step", [3, 5])
def test_cut_off_and_resumed_is_bit_equal(tmp_path: Path, kind: str, step: int) -> None:
    weights = train(tmp_path / "undisturbed", arm(kind))
    with pytest.raises(CutOffError):
        train(tmp_path / "cut", arm(kind), cut_before=step)
    torch.manual_seed(12345)
    resumed = train(tmp_path / "cut", arm(kind))
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["cml", "bn", "ll"])
def test_it_learns(tmp_path: Path, kind: str) -> None:
    """Labels here are noise; that of images which were trained on is learned all the same."""
    made, split = arm(kind), Domains(12, 9, 15)
    train(tmp_path, made, steps=150, domains=1, lr=0.05)
    right = 0
    for members in split.members.values():
        said = private_copy(made).adapt(split.images(members)).logits(split.images(members))
        right += int((said.argmax(1) == split.labels[members]).sum())
    assert right >= 24


def test_too_few_query_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^batch_size: must be at least 7, an image to query for each episode, got 6$"):
        train(tmp_path, arm("bn"), domains=7)
