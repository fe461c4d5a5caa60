"""A run: what every stage needs to know, how a network is trained in it, and how a stage takes or leaves its result."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401 - the first look at the validation domains would count its import as training
import torch
from torch import Tensor, nn

from dmoe.artifacts import (
    digest_of_facts,
    load_into,
    load_tensors,
    under_prefix,
)
from dmoe.backbones import build_backbone
from dmoe.config import (
    HOW_EXPERTS_ARE_LAUNCHED,
    BackboneConfig,
    Config,
    DomainsConfig,
    ObjectiveConfig,
    TrainingConfig,
    as_inputs,
)
from dmoe.console import say
from dmoe.data.base import DomainDataset, DomainSplit
from dmoe.data.streams import DomainBatches, SupervisedBatches, stored_images
from dmoe.distributed import ALONE, World
from dmoe.errors import UserError
from dmoe.evaluation import Evaluation, Method, WithTokens, evaluate_all
from dmoe.loop import Progress, Report, tidy
from dmoe.models.networks import Network, in_layout
from dmoe.models.sparse import balance_of, routings, sparse_layers
from dmoe.objectives import SWAD, Outputs, build_objective
from dmoe.precision import computing_in, not_coarse
from dmoe.protocols import Protocol
from dmoe.published import PublishedFolder
from dmoe.randomness import Key, seed_of
from dmoe.run_folder import RunFolder, Stage
from dmoe.supervised import train_supervised


@dataclass(frozen=True)
class Run:
    """What every stage needs to know.

    Attributes:
        groups: which expert each source domain belongs to, by ``DomainSplit.group_domains``.
        workers: processes that read images ahead.
        published: checkpoints of the paper's authors, where the user has named some.
        given: which of ``experts``, ``aggregator`` and ``student`` are loaded, not trained.
        world: the processes that work on the run together.
    """

    config: Config
    folder: RunFolder
    dataset: DomainDataset
    groups: Mapping[int, int]
    device: torch.device
    workers: int = 0
    published: PublishedFolder | None = None
    given: Collection[str] = ()
    world: World = ALONE

    @property
    def source(self) -> DomainSplit:
        return self.dataset.splits["source"]

    @property
    def validation(self) -> DomainSplit:
        return self.dataset.splits["validation"]

    @cached_property
    def own_expert(self) -> Tensor:
        """The expert whose group holds each source image's domain, ``[n]``."""
        return torch.tensor([self.groups[domain] for domain in self.source.group_domains.tolist()])

    def facts(self, *sections: str, **more: Any) -> dict[str, Any]:
        """Inputs of a stage: the seed, the data, the named configuration sections, and digests of earlier results."""
        config = as_inputs(self.config)
        chosen = {section: config[section] for section in sections}
        if "experts" in chosen:
            chosen["experts"] = {key: value for key, value in config["experts"].items() if key not in HOW_EXPERTS_ARE_LAUNCHED}
            chosen["groups"] = digest_of_facts({str(domain): expert for domain, expert in self.groups.items()})
        chosen.get("meta", {}).pop("memory_gb", None)
        return {"seed": self.config.seed, "data": self.dataset.fingerprint, **chosen, **more}

    def network(self, backbone: BackboneConfig, *key: Key, to_train: bool) -> Network:
        """A network of this data set's shape, initialised as a function of the seed and ``key``.

        One that is to be trained starts from the backbone's weights; the other is an empty vessel.
        """
        torch.manual_seed(seed_of(self.config.seed, "initial weights", *key))
        shape, outputs = self.dataset.image_shape, self.dataset.task.num_outputs
        network = build_backbone(backbone, image_shape=shape, num_outputs=outputs, to_train=to_train).to(self.device)
        return in_layout(network, torch.channels_last)

    @property
    def student_stage(self) -> Stage:
        return self.folder.stage("student", self.facts("student", backbone=self.config.student_backbone.model_dump(mode="json")))

    def expert_stage(self, number: int) -> Stage:
        return self.folder.expert(number, self.facts("experts", expert=number))

    @property
    def protocol(self) -> Protocol:
        """How the run is tested."""
        return Protocol(self.config.support_size, score_support=self.config.evaluation.score_support)

    def evaluate(self, method: Method | WithTokens, split: str, protocol: Protocol) -> Evaluation:
        """A method on a split."""
        return self.evaluate_all({"": method}, split, [protocol])[""][0]

    def evaluate_all(
        self, methods: Mapping[str, Method | WithTokens], split: str, protocols: Sequence[Protocol], *, name: str | None = None
    ) -> dict[str, list[Evaluation]]:
        """Several methods on the same images, by several protocols; ``name`` is that of a progress bar."""
        size = self.config.evaluation.batch_size
        return evaluate_all(
            methods, self.dataset, split, protocols, batch_size=size, workers=self.workers, name=name, world=self.world
        )

    def train_network(
        self,
        stage: Stage,
        network: Network,
        members: Tensor,
        training: TrainingConfig,
        report: Report | None = None,
        *,
        objective: ObjectiveConfig,
    ) -> Progress:
        """Train a network on the given source images; it ends with the weights that are best on the validation domains, or SWAD's.

        Args:
            objective: what is minimised.
        """
        key: tuple[Key, ...] = (self.config.seed, stage.name)
        torch.manual_seed(seed_of(self.config.seed, "initial weights", "objective"))
        known = self.source.domains[members].unique().tolist()
        chosen = build_objective(objective, self.dataset.task, network=network, domains=known)
        average = chosen if isinstance(chosen, SWAD) else None
        if isinstance(chosen, nn.Module):
            chosen.to(self.device)
        batches = self.batches(members, training, objective, key=key)
        listening = partial(routings, network.features) if sparse_layers(network.features) else partial(nullcontext, {})

        def loss(step: int, pixels: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
            with computing_in(training.precision, self.device), listening() as routed:
                images = self.source.finish(pixels)
                features = network.features(images)
                logits = network.head(features)
            found = chosen.loss(Outputs(not_coarse(features), not_coarse(logits), labels, domains, images), step=step)
            balance = balance_of(network.features, routed) if routed else None
            return found if balance is None else found + balance

        def evaluate() -> float:
            logits = self.validation_logits(network)
            if average is not None:
                average.evaluated(network, self.dataset.task.loss(torch.cat(logits), self.validation.labels).item())
            return self.validation_metric(logits)

        return train_supervised(
            stage=stage,
            module=network,
            loss=loss,
            batch=batches,
            steps_per_epoch=batches.steps_per_epoch,
            training=training,
            evaluate=evaluate,
            checkpoint_every=self.config.checkpoint_every,
            seed=seed_of(*key),
            device=self.device,
            workers=self.workers,
            report=report,
            describe=lambda step: self.source.describe(batches.index(step)),
            objective=chosen if isinstance(chosen, nn.Module) and average is None else None,
            restart_at=chosen.restart_at,
            gradient=chosen.gradient,
            average=average,
        )

    def batches(
        self, members: Tensor, training: TrainingConfig, objective: ObjectiveConfig, *, key: tuple[Key, ...] = ()
    ) -> SupervisedBatches | DomainBatches:
        """Of the given source images, as the objective needs them: of a few domains at a time, or whatever comes.

        Raises:
            UserError: domains are to be compared, and there is one only, or too few images of each in a batch.
        """
        if isinstance(objective, DomainsConfig):
            size, domains = training.batch_size, objective.domains
            return DomainBatches(self.source, members, batch_size=size, domains=domains, key=key)
        return SupervisedBatches(self.source, members, batch_size=training.batch_size, key=key)

    def first(self, work: Callable[[], object]) -> None:
        """Do what only one process can, in the first one; the others wait for it."""
        if self.world.is_first:
            work()
        self.world.wait()

    def finished_or(
        self,
        train: Callable[[], Progress],
        stage: Stage,
        modules: Mapping[str, nn.Module],
        *,
        only_load: bool = False,
        together: bool = False,
    ) -> None:
        """Fill ``modules`` with the stage's result: the finished one, or that of training now.

        Args:
            together: all processes train; otherwise the first one does, and the others wait for the result.
        """
        first = self.world.is_first
        with stage.alone() if first else nullcontext():
            if self.world.from_first(lambda: load_finished(stage, modules)):
                say(f"{stage.name}: already finished from the same inputs ({stage.folder})")
            else:
                if only_load:
                    raise nothing_to_load(stage.folder)
                progress = train() if first or together else None
                if first and progress is not None:
                    stage.finish(files=[stage.weights], figures=progress.figures())
                    say(f"{stage.name}: {progress.summary()} ({stage.folder})")
            if first:
                tidy(stage)
        self.world.wait()
        if not first:
            load_finished(stage, modules)

    def score(self, network: Network) -> float:
        """The selection metric of a network, as it is, on all validation images."""
        return self.validation_metric(self.validation_logits(network))

    def validation_logits(self, network: Network) -> list[Tensor]:
        """What a network, as it is, says of all validation images, batch by batch."""
        batches = torch.arange(len(self.validation)).split(self.config.evaluation.batch_size)
        with torch.no_grad():
            images = stored_images(self.validation, batches, workers=self.workers, device=self.device)
            return [network(batch).cpu() for batch in images]

    def validation_metric(self, logits: Sequence[Tensor]) -> float:
        """The selection metric of logits of all validation images, batch by batch."""
        predictions = self.dataset.task.predictions(torch.cat(list(logits)))
        index = torch.arange(len(self.validation))
        return self.dataset.metrics("validation", index, predictions)[self.dataset.selection_metric]


def load_finished(stage: Stage, modules: Mapping[str, nn.Module]) -> bool:
    """Fill ``modules`` with the stage's result, if it is finished."""
    if stage.finished() is None:
        return False
    tensors = load_tensors(stage.weights)[0]
    for name, module in modules.items():
        load_into(module, under_prefix(name, tensors), where=str(stage.weights))
        module.eval()
    return True


def nothing_to_load(folder: Path) -> UserError:
    return UserError(f"{folder}: no finished {folder.name} here: run without the flag that asks to load it")
