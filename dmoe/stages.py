"""The stages after the experts, up to meta-training: each takes what the earlier ones left in the run folder, and leaves its own.

A stage that finds its finished result, made from the same inputs, says so and takes it; one that was cut off goes on. A result
can also be taken from the checkpoints that the paper's authors published.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe.artifacts import (
    digest_of_file,
    read_json,
    save_tensors,
)
from dmoe.config import (
    DomainsConfig,
    ExpertsConfig,
    StudentConfig,
)
from dmoe.console import say
from dmoe.data.episodes import EpisodeSampler
from dmoe.data.streams import EpochOrder
from dmoe.data.transforms import random_views
from dmoe.errors import UserError
from dmoe.loop import Progress, Trainee
from dmoe.model import build_aggregator
from dmoe.models.aggregator import Aggregator
from dmoe.models.expert_pool import ExpertPool
from dmoe.models.networks import Network
from dmoe.published import PublishedFolder, TrainingStage
from dmoe.randomness import Key, seed_of
from dmoe.run import Run, load_finished, nothing_to_load
from dmoe.run_folder import Stage
from dmoe.supervised import task_loss, train_supervised
from dmoe.tokens import TokenStore, build_store, is_stored


def check(run: Run, *, expert: int | None = None, tests: bool = False) -> None:
    """Find now what would otherwise be found after hours.

    Args:
        expert: the one that is to be trained.
        tests: whether published networks are those to be tested, as meta-training left them.

    Raises:
        UserError: episodes do not fit the source domains, the networks do not fit each other, weights cannot be fetched or
            read, what is to be loaded is missing or does not fit, or there is no such expert.
    """
    config = run.config
    if expert is not None and not 0 <= expert < config.experts.count:
        raise UserError(f"--expert_idx: must be 0 to {config.experts.count - 1}, got {expert}")
    EpisodeSampler(run.source, support_size=config.meta.support_size, query_size=config.meta.query_size, key=())
    for number in range(config.experts.count if "experts" not in run.given else 0):
        check_objective(run, f"experts (number {number})", torch.where(run.own_expert == number)[0], config.experts)
    if "student" not in run.given:
        check_objective(run, "student", torch.arange(len(run.source)), config.student)
    # Pretrained weights are fetched here once, not by every expert's process.
    fresh_expert = "experts" not in run.given and not run.expert_stage(expert or 0).manifest.exists()
    fresh_student = "student" not in run.given and not run.student_stage.manifest.exists()
    ours, theirs = config.student_backbone, config.experts.backbone
    alike = ours.model_copy(update={"last_relu": theirs.last_relu}) == theirs
    network = run.network(theirs, "check", to_train=fresh_expert or (alike and fresh_student))
    student = network if alike else run.network(ours, "check", to_train=fresh_student)
    if network.width != student.width:
        sizes = f"its features are {student.width} wide, the experts' are {network.width}"
        raise UserError(f"student.backbone: {sizes}: they must be equal")
    with torch.device(run.device if run.published is not None else "meta"):  # whether it can be built is quickly told
        aggregator = build_aggregator(config.aggregator, width=student.width, num_outputs=run.dataset.task.num_outputs)
    for name in ("aggregator", "student"):
        if name in run.given and not tests and run.published is None and not (run.folder.path / name / "manifest.json").exists():
            raise nothing_to_load(run.folder.path / name)
    if run.published is not None:
        _check_published(run, run.published, tests=tests, expert=network, aggregator=aggregator, student=student)


def check_objective(run: Run, name: str, members: Tensor, config: ExpertsConfig | StudentConfig) -> None:
    """Raise a UserError where the objective of a training on the given source images cannot be minimised on them."""
    if isinstance(config.objective, DomainsConfig):
        try:
            run.batches(members, config.training, config.objective)
        except UserError as error:
            raise UserError(f"{name}: objective {config.objective.name}: {error}") from None


def _check_published(
    run: Run, published: PublishedFolder, *, tests: bool, expert: Network, aggregator: Aggregator, student: Network
) -> None:
    """Read every file that is going to be used into networks that serve for nothing else."""
    stage: TrainingStage = "meta" if tests else "pretrained"
    if "experts" in run.given:
        for number in range(run.config.experts.count):
            if tests or not run.expert_stage(number).manifest.exists():
                published.load_expert(number, expert)
    if "aggregator" in run.given and (tests or not (run.folder.path / "aggregator" / "manifest.json").exists()):
        published.load_aggregator(stage, aggregator)
    if "student" in run.given and (tests or not run.student_stage.manifest.exists()):
        published.load_student(stage, student)
    if tests and published.student_path("pretrained").is_file():
        published.load_student("pretrained", student)


def load_experts(run: Run) -> list[Network]:
    """All trained experts of the run, as tokens are taken from them.

    Raises:
        UserError: one is missing or was made from other inputs.
    """
    experts = []
    for number in range(run.config.experts.count):
        stage = run.expert_stage(number)
        expert = run.network(run.config.token_backbone, "expert", number, to_train=False)
        if run.published is not None:
            take = partial(run.published.load_expert, number, expert)
            run.first(partial(_take_over, stage, {"model": expert}, take, run.published.expert_path(number)))
        if not load_finished(stage, {"model": expert}):
            raise UserError(
                f"{stage.folder}: expert {number} is not trained: "
                f"python train_single_expert.py --run_dir {run.folder.path} --expert_idx {number}"
            )
        experts.append(expert)
    return experts


def make_tokens(run: Run, experts: Sequence[Network]) -> dict[str, TokenStore]:
    """Stage 2: the tokens of all source and validation images."""
    digests = [run.expert_stage(i).files() for i in range(len(experts))]
    pool = ExpertPool((expert.features for expert in experts), precision=run.config.tokens.precision).to(run.device)
    stores = {}
    for name in ("source", "validation"):
        stage = run.folder.stage(f"tokens/{name}", run.facts("tokens", experts=digests, split=name))
        began = time.perf_counter()
        ready = is_stored(stage)
        stores[name] = build_store(
            stage,
            split=run.dataset.splits[name],
            pool=pool,
            width=experts[0].width,
            batch_size=run.config.tokens.batch_size,
            device=run.device,
            storage=run.config.tokens.storage,
            views=run.dataset.splits[name].views if run.config.tokens.views == "all" else 1,
            workers=run.workers,
            world=run.world,
        )
        how = "already stored" if ready else f"{time.perf_counter() - began:.0f} s"
        say(f"tokens of {len(stores[name]):,} {name} images: {how} ({stage.folder})")
    return stores


def pretrain_aggregator(run: Run, tokens: Mapping[str, TokenStore], width: int, *, only_load: bool = False) -> Aggregator:
    """Stage 3: the aggregator learns to classify from stored tokens; no image is opened and no expert runs."""
    config, task = run.config.aggregator, run.dataset.task
    torch.manual_seed(seed_of(run.config.seed, "initial weights", "aggregator"))
    aggregator = build_aggregator(config, width=width, num_outputs=task.num_outputs).to(run.device)
    made_from = read_json(run.folder.path / "tokens" / "source" / "manifest.json")["key"]
    stage = run.folder.stage("aggregator", run.facts("aggregator", tokens=made_from))
    key: tuple[Key, ...] = (run.config.seed, "aggregator")
    order = EpochOrder(len(run.source), config.training.batch_size, *key)
    source, labels = tokens["source"], run.source.labels

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = order[step]
        return source.of_views(index, random_views(len(index), source.views, *key, "view", step)), labels[index]

    def score() -> float:
        batches = torch.arange(len(run.validation)).split(run.config.tokens.batch_size)
        with torch.no_grad():
            return run.validation_metric([aggregator.logits(tokens["validation"][i].to(run.device)).cpu() for i in batches])

    def train() -> Progress:
        return train_supervised(
            stage=stage,
            module=aggregator,
            loss=task_loss(aggregator.logits, task, precision=config.training.precision, device=run.device),
            batch=batch,
            steps_per_epoch=order.steps_per_epoch,
            training=config.training,
            evaluate=score,
            checkpoint_every=run.config.checkpoint_every,
            seed=seed_of(*key),
            device=run.device,
            describe=lambda step: run.source.describe(order[step]),
        )

    if only_load and run.published is not None:
        take = partial(run.published.load_aggregator, "pretrained", aggregator)
        run.first(partial(_take_over, stage, {"model": aggregator}, take, run.published.aggregator_path("pretrained")))
    run.finished_or(train, stage, {"model": aggregator}, only_load=only_load)
    return aggregator


def pretrain_student(run: Run, *, only_load: bool = False) -> Network:
    """Stage 4: supervised training on all source domains together, by the objective of the configuration."""
    stage = run.student_stage
    student = run.network(run.config.student_backbone, "student", to_train=not (only_load or stage.manifest.exists()))

    def train() -> Progress:
        config, members = run.config.student, torch.arange(len(run.source))
        return run.train_network(stage, student, members, config.training, objective=config.objective)

    if only_load and run.published is not None:
        take = partial(run.published.load_student, "pretrained", student)
        run.first(partial(_take_over, stage, {"model": student}, take, run.published.student_path("pretrained")))
    run.finished_or(train, stage, {"model": student}, only_load=only_load)
    return student


def _take_over(stage: Stage, modules: Mapping[str, nn.Module], take: Callable[[], object], path: Path) -> None:
    """Unless the stage is finished, make weights that somebody published its result; the manifest says whose they are."""
    with stage.alone():
        if stage.finished() is not None:
            return
        take()
        save_tensors(stage.weights, Trainee(modules=modules, optimizers={}).weights())
        stage.finish(files=[stage.weights], figures={"taken_from": path.name, "sha256": digest_of_file(path)})
    say(f"{stage.name}: taken from {path} ({stage.folder})")
