"""A finished run as a model to use: ``dmoe.load(folder).adapt(images)``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dmoe.adaptation import Adapter
from dmoe.artifacts import load_into, load_tensors, read_json, under_prefix, write_json
from dmoe.backbones import build_backbone
from dmoe.config import LARGEST_EDGE, AggregatorConfig, BackboneConfig, Config
from dmoe.data.base import DomainDataset
from dmoe.data.transforms import ImageTransform
from dmoe.diagnosis import Ranges
from dmoe.errors import UserError
from dmoe.meta.learner import ZeroTarget
from dmoe.models.aggregator import Aggregator
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.run_folder import RunFolder, Stage
from dmoe.tasks import Task

DESCRIPTION = "model.json"
RANGES = "ranges.json"
"""What adapting does in training episodes, in the folder ``diagnosis``."""

AnyAdapter = TypeVar("AnyAdapter", bound=Adapter)


class Model(Adapter):
    """An :class:`Adapter` that knows what its images and classes are.

    Attributes:
        transform: picture to tensor ``[C, H, W]``.
        class_names: one a class.
        config: of the run it was trained by.
    """

    transform: ImageTransform
    class_names: Sequence[str]
    config: Config


class Single(Student):
    """A network that was trained alone (``method: erm``): it predicts, and does not adapt.

    Attributes:
        transform: picture to tensor ``[C, H, W]``.
        class_names: one a class.
        config: of the run it was trained by.
    """

    transform: ImageTransform
    class_names: Sequence[str]
    config: Config


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """The model of a finished run.

    Raises:
        UserError: not a run folder, the run is not finished or trained one network alone, or a weights file is missing, damaged or
            of another network.
    """
    run = RunFolder(Path(folder))
    return load_as(run, run.config(), device=device)


def load_single(folder: str | Path, *, device: str | torch.device = "cpu") -> Single:
    """The network of a finished run that trained it alone: ``dmoe.load_single(folder).predict(images)``.

    Raises:
        UserError: not such a run folder, the run is not finished, or the weights file is missing, damaged or of another network.
    """
    run = RunFolder(Path(folder))
    config = run.config()
    if not config.trains_one:
        raise UserError(f"{run.path}: a run of all stages, not of one network alone: dmoe.load opens it")
    transform, task, class_names = _description(run)
    backbone, weights = config.student_backbone, _whole(run.stage("student", {}))
    network = build_backbone(backbone, image_shape=transform.image_shape, num_outputs=task.num_outputs)
    load_into(network, under_prefix("model", load_tensors(weights)[0]), where=str(weights))
    network.to(device).eval()
    model = Single(features=network.features, head=network.head, task=task)
    model.transform, model.class_names, model.config = transform, class_names, config
    return model


def _description(run: RunFolder) -> tuple[ImageTransform, Task, list[str]]:
    """What :func:`describe` wrote."""
    if not (run.path / DESCRIPTION).is_file():
        way = f"python run.py --run_dir {run.path}"
        raise UserError(f"{run.path}: the run is not finished (no {DESCRIPTION}): {way}")
    facts = read_json(run.path / DESCRIPTION)
    try:
        transform, task = ImageTransform.from_facts(facts["transform"]), Task.from_facts(facts["task"])
        class_names = [str(name) for name in facts["class_names"]]
        if max(transform.image_shape) > LARGEST_EDGE:
            raise ValueError(f"images {list(transform.image_shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path / DESCRIPTION}: damaged ({error}): run.py writes it anew") from None
    return transform, task, class_names


def load_as(run: RunFolder, config: Config, *, device: str | torch.device) -> Model:
    """:func:`load`, evaluating by ``config``, which differs from the run's own in how it is tested at most."""
    if config.trains_one:
        raise UserError(f"{run.path}: one network trained alone (method erm), which does not adapt: dmoe.load_single opens it")
    transform, task, class_names = _description(run)

    def network(backbone: BackboneConfig) -> Network:
        return build_backbone(backbone, image_shape=transform.image_shape, num_outputs=task.num_outputs)

    meta = _whole(run.stage("meta", {}))
    trained = load_tensors(meta)[0]
    outputs = len(trained["student.head.weight"]) if "student.head.weight" in trained else task.num_outputs
    if outputs != task.num_outputs:
        raise UserError(f"{run.path / DESCRIPTION}: says {task.num_outputs} outputs, {meta} has {outputs}: run.py writes it anew")
    student = network(config.student_backbone)
    load_into(student, under_prefix("student", trained), where=str(meta))
    experts = []
    for number in range(config.experts.count):
        expert, weights = network(config.token_backbone), _whole(run.expert(number, {}))
        load_into(expert, under_prefix("model", load_tensors(weights)[0]), where=str(weights))
        experts.append(expert)
    aggregator: nn.Module = ZeroTarget()
    if config.meta.target == "aggregator":
        aggregator = build_aggregator(config.aggregator, width=student.width, num_outputs=task.num_outputs)
    load_into(aggregator, under_prefix("aggregator", trained), where=str(meta))
    for module in (student, aggregator, *experts):
        module.to(device)
    ranges = read_ranges(run, config)
    model = build_adapter(config, task, experts=experts, aggregator=aggregator, student=student, kind=Model, ranges=ranges)
    model.transform, model.class_names, model.config = transform, class_names, config
    return model


def _whole(stage: Stage) -> Path:
    """The stage's weights, where they are as its manifest has them."""
    if stage.manifest.exists():
        stage.refuse_damaged(read_json(stage.manifest))
    return stage.weights


def read_ranges(run: RunFolder, config: Config) -> Ranges | None:
    """What adapting does in the run's training episodes; None where that was not measured with these weights, where domains are
    too few or too small to tell, or where adapting is not what it was then, because experts normalise by the batch.

    Raises:
        UserError: the file is damaged.
    """
    path = run.path / "diagnosis" / RANGES
    if not path.is_file() or config.evaluation.expert_batch_norm != "running":
        return None
    facts = read_json(path)
    try:
        ranges, weights = Ranges.from_facts(facts), facts["made_from"]["meta"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): delete {path.parent} and let run.py make it") from None
    meta = run.stage("meta", {}).manifest
    ours = meta.is_file() and read_json(meta)["files"] == weights
    return ranges if ours and ranges.by_name else None


def build_aggregator(config: AggregatorConfig, *, width: int, num_outputs: int) -> Aggregator:
    """A fresh aggregator.

    Raises:
        UserError: the heads do not divide the width.
    """
    if config.pooling == "transformer" and width % config.heads:
        raise UserError(f"aggregator.heads: {config.heads} heads do not divide the feature width {width}")
    return Aggregator(
        width=width,
        num_outputs=num_outputs,
        depth=config.depth,
        heads=config.heads,
        dropout=config.dropout,
        output_map=config.output_map,
        pooling=config.pooling,
    )


def build_adapter(
    config: Config,
    task: Task,
    *,
    experts: Sequence[Network],
    aggregator: nn.Module,
    student: Network,
    kind: type[AnyAdapter],
    ranges: Ranges | None = None,
) -> AnyAdapter:
    """The product, from its parts, by the configuration's inner step, batch-norm statistics and what to do where it is suspect."""
    return kind(
        features=student.features,
        head=student.head,
        experts=[expert.features for expert in experts],
        aggregator=aggregator,
        inner_lr=config.meta.inner_lr,
        inner_steps=config.meta.inner_steps,
        inner_loss=config.meta.inner_loss,
        distill=config.meta.distill,
        expert_batch_norm=config.evaluation.expert_batch_norm,
        expert_precision=config.tokens.precision,
        task=task,
        ranges=ranges,
        on_suspect=config.evaluation.on_suspect,
    )


def describe(run: RunFolder, dataset: DomainDataset) -> None:
    """Write beside the weights what :func:`load` cannot know from the configuration."""
    task = {"kind": dataset.task.kind, "num_outputs": dataset.task.num_outputs}
    facts = {"task": task, "transform": dataset.transform.to_facts(), "class_names": list(dataset.class_names)}
    path = run.path / DESCRIPTION
    if not path.exists() or read_json(path) != json.loads(json.dumps(facts)):
        write_json(path, facts)
