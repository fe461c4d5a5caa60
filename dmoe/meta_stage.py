"""Stage 5: student and aggregator are meta-trained, in a way that fits the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmoe.adaptation import Adapter
from dmoe.artifacts import read_json, write_json
from dmoe.config import EvaluationConfig, as_inputs
from dmoe.console import say
from dmoe.data.streams import stored_images
from dmoe.errors import UserError
from dmoe.evaluation import WithTokens
from dmoe.loop import Progress
from dmoe.memory import memory_budget
from dmoe.meta.choice import Choice, choose, remember, remembered
from dmoe.meta.learner import EpisodeBatch, MetaLearner, Way, ZeroTarget
from dmoe.meta.training import meta_train
from dmoe.model import build_adapter, describe
from dmoe.models.aggregator import Aggregator
from dmoe.models.expert_pool import without_own_expert
from dmoe.models.networks import Network
from dmoe.protocols import Protocol
from dmoe.randomness import generator, seed_of
from dmoe.run import Run
from dmoe.tokens import TokenStore

GRADIENT_FILE = "gradient.json"
"""How meta-training computes its gradients, so that it goes on in the same way."""

OUTPUT_MAP_IMAGES = 8000
"""Source images that the aggregator's output map is fitted on."""


def meta_train_student(
    run: Run,
    tokens: Mapping[str, TokenStore],
    experts: Sequence[Network],
    aggregator: Aggregator,
    student: Network,
    *,
    name: str = "meta",
    pretrained: str = "student",
) -> None:
    """Stage 5: student and aggregator are meta-trained. Then the run folder is a model that ``dmoe.load`` opens.

    Args:
        name: of the stage; another one for a variant, which is trained beside the run's own.
        pretrained: the stage whose result the student is.
    """
    config, task = run.config.meta, run.dataset.task
    made_from: dict[str, Any] = {name: run.folder.stage(name, {}).files() for name in ("aggregator", pretrained)}
    made_from["tokens"] = read_json(run.folder.path / "tokens" / "source" / "manifest.json")["key"]
    stage = run.folder.stage(name, run.facts("experts", "meta", "aggregator", made_from=made_from))
    teacher: Aggregator | ZeroTarget = ZeroTarget() if config.target == "zeros" else aggregator
    if config.student_start == "random":
        student = run.network(run.config.student_backbone, "meta", "student", to_train=False).eval()
    # Validation is by the experts' running statistics, however the run is tested later.
    validating = run.config.model_copy(update={"evaluation": EvaluationConfig()})
    adapter = build_adapter(validating, task, experts=experts, aggregator=teacher, student=student, kind=Adapter)

    def train() -> Progress:
        if run.world.is_first and isinstance(teacher, Aggregator) and teacher.output_map is not None:
            _fit_output_map(run, tokens["source"], teacher, student)
        learner = meta_learner(run, teacher, student)
        choice = Choice.from_facts(run.world.from_first(lambda: asdict(gradient_way(run, learner, name))))
        learner.way = choice.way

        def note(choice: Choice) -> None:
            if run.world.is_first:
                write_json(stage.folder / GRADIENT_FILE, {**asdict(choice), "memory_gb": config.memory_gb})

        def way_changed(way: Way) -> None:
            note(Choice(way))
            say(f"{stage.name}: memory did not suffice; going on by {Choice(way)}")

        note(choice)
        say(f"{stage.name}: gradients by {choice}")
        return meta_train(
            stage=stage,
            learner=learner,
            split=run.source,
            tokens=tokens["source"],
            own_expert=run.own_expert,
            config=config,
            # The adapter shares the tensors that are being trained.
            evaluate=lambda: (
                run.evaluate(
                    WithTokens(adapter, lambda index: tokens["validation"][index]),
                    "validation",
                    Protocol(config.support_size),
                ).score
            ),
            checkpoint_every=run.config.checkpoint_every,
            seed=seed_of(run.config.seed, "meta"),
            device=run.device,
            workers=run.workers,
            way_changed=way_changed,
            world=run.world,
        )

    run.finished_or(train, stage, {"student": student, "aggregator": teacher}, together=True)
    run.first(lambda: describe(run.folder, run.dataset))


def meta_learner(run: Run, teacher: Aggregator | ZeroTarget, student: Network) -> MetaLearner:
    """Student and aggregator, to learn by the run's inner steps.

    Raises:
        UserError: nothing would learn.
    """
    config = run.config.meta
    learner = MetaLearner(
        student=student,
        aggregator=teacher,
        task=run.dataset.task,
        inner_lr=config.inner_lr,
        inner_steps=config.inner_steps,
        inner_loss=config.inner_loss,
        distill=config.distill,
        learns=config.learns,
        precision=config.precision,
    )
    if not (learner.student_parameters or learner.aggregator_parameters):
        raise UserError("meta.learns: aggregator: this one has no parameters to learn: take both or student")
    return learner


def gradient_way(run: Run, learner: MetaLearner, name: str = "meta") -> Choice:
    """How the run's meta-gradients are computed: as configured, as it began, as this machine remembers, or as it finds now.

    Raises:
        UserError: the student cannot be differentiated twice, or does not fit into memory.
    """
    config, device = run.config.meta, run.device
    if config.gradient != "auto":
        return Choice(Way(config.gradient, config.chunk_size))
    if config.chunk_size is not None:
        return Choice(Way("forward_over_reverse", config.chunk_size))
    begun = _begun(run.folder.stage(name, {}).folder / GRADIENT_FILE, memory_gb=config.memory_gb)
    if begun is not None:
        return begun
    budget = memory_budget(device) if config.memory_gb is None else int(1e9 * config.memory_gb)
    facts = {
        "student": run.config.student_backbone.model_dump(mode="json"),
        "aggregator": {key: value for key, value in as_inputs(run.config)["aggregator"].items() if key != "training"},
        "images": [*run.dataset.image_shape, config.support_size, config.query_size],
        "experts": run.config.experts.count,
        "inner": [config.inner_steps, config.inner_loss, config.mask, config.target, config.precision],
        **({"distill": config.distill} if config.distill != "features" else {}),
        "device": device.type,
        "budget": budget,
    }
    known = remembered(facts)
    if known is None:
        known = choose(learner, _any_episode(run, learner), budget=budget)
        remember(facts, known)
    return known


def _begun(path: Path, *, memory_gb: float | None) -> Choice | None:
    """The way that a meta-training which was cut off went, as long as it is allowed as much memory as then."""
    if not path.is_file():
        return None
    facts = read_json(path)
    try:
        return Choice.from_facts(facts) if facts["memory_gb"] == memory_gb else None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): delete it to choose again") from None


def _any_episode(run: Run, learner: MetaLearner) -> EpisodeBatch:
    """Of the run's shapes; the values are random."""
    config, shape, random = run.config.meta, run.dataset.image_shape, generator("any episode")
    tokens = run.config.experts.count - (config.mask == "remove")
    return EpisodeBatch(
        torch.randn(config.support_size, *shape, generator=random),
        torch.randn(config.support_size, tokens, learner.student.width, generator=random),
        torch.randn(config.query_size, *shape, generator=random),
        torch.zeros(config.query_size, dtype=run.source.labels.dtype),
    ).to(run.device)


def _fit_output_map(run: Run, tokens: TokenStore, aggregator: Aggregator, student: Network) -> None:
    """Start the aggregator's output map from the best affine map of its targets onto the features of the student at the start."""
    chosen = torch.randperm(len(run.source), generator=generator(run.config.seed, "output map"))[:OUTPUT_MAP_IMAGES]
    pooled, features = [], []
    with torch.no_grad():
        for index in chosen.split(run.config.tokens.batch_size):
            masked = without_own_expert(tokens[index], run.own_expert[index], mask=run.config.meta.mask)
            pooled.append(aggregator.pooled(masked.to(run.device)))
        batches = chosen.split(run.config.tokens.batch_size)
        for images in stored_images(run.source, batches, workers=run.workers, device=run.device):
            features.append(student.features(images))
    aggregator.fit_output_map(torch.cat(pooled), torch.cat(features))
