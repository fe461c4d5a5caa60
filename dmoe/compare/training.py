"""What is compared with and has a training of its own: each is a stage of a run, which goes on where it was cut off.

All begin with the initial weights of the run's student, or with those that its pretraining left, and are chosen on the validation
domains.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dmoe.baselines.arm import Arm
from dmoe.baselines.arm_bn import ArmBn
from dmoe.baselines.arm_cml import ArmCml, ContextNetwork
from dmoe.baselines.arm_ll import ArmLl, LossNetwork
from dmoe.baselines.arm_training import train_in_episodes
from dmoe.baselines.unadapted import Unadapted
from dmoe.config import EMoEConfig, ERMConfig, GMoEConfig, ObjectiveConfig, TrainingConfig
from dmoe.data.told import told_domain
from dmoe.distributed import ALONE
from dmoe.errors import DoesNotApply, UserError
from dmoe.evaluation import Method
from dmoe.loop import Progress
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.protocols import Protocol
from dmoe.randomness import seed_of
from dmoe.run import Run
from dmoe.run_folder import Stage


def train_plainly(
    run: Run, stage: Stage, *, training: TrainingConfig, objective: ObjectiveConfig, pretrained: Network | None = None
) -> Method:
    """Supervised training, as the student's, for as long as ``training`` says.

    Args:
        objective: what is minimised, see :mod:`dmoe.objectives`.
        pretrained: the student whose weights are begun with; None: the student's initial ones.
    """
    network = network_trained_plainly(run, stage, training=training, objective=objective, pretrained=pretrained)
    return Unadapted(Student(features=network.features, head=network.head, task=run.dataset.task))


def network_trained_plainly(
    run: Run, stage: Stage, *, training: TrainingConfig, objective: ObjectiveConfig, pretrained: Network | None = None
) -> Network:
    """See :func:`train_plainly`."""
    network = _network(run, stage, pretrained)

    def train() -> Progress:
        return run.train_network(stage, network, torch.arange(len(run.source)), training, objective=objective)

    run.finished_or(train, stage, {"model": network})
    return network


def sparse_run(run: Run, *, sparse: GMoEConfig | EMoEConfig) -> Run:
    """The run with a sparse student.

    Raises:
        DoesNotApply: its student is no transformer, or the experts inside do not fit.
    """
    student = run.config.student
    backbone = run.config.student_backbone.model_copy(update={"sparse": sparse})
    changed = replace(run, config=run.config.model_copy(update={"student": student.model_copy(update={"backbone": backbone})}))
    try:
        changed.network(backbone, "check", to_train=False)
    except UserError as error:
        raise DoesNotApply(f"{sparse.kind}: {error}") from None
    return changed


def told_run(run: Run) -> Run:
    """The run as :func:`train_oracle` sees it, and as what that trained is to be tested on.

    Raises:
        UserError: nothing is known of the domains of its data set.
    """
    return replace(run, dataset=told_domain(run.dataset))


def train_oracle(run: Run, stage: Stage, *, training: TrainingConfig) -> Method:
    """Plain supervised training on images that say which domain they are of.

    Args:
        run: made by :func:`told_run`.
    """
    return train_plainly(run, stage, training=training, objective=ERMConfig())


def train_arm_cml(
    run: Run,
    stage: Stage,
    *,
    training: TrainingConfig,
    domains: int,
    context_channels: int,
    context_width: int,
    kernel_size: int,
    pretrained: Network | None,
) -> Method:
    """See :class:`~dmoe.baselines.arm_cml.ArmCml` and :func:`~dmoe.baselines.arm_training.train_in_episodes`.

    Args:
        pretrained: the student whose weights are begun with, the context counting for nothing at first; None: none.
    """
    wider = replace(run, dataset=run.dataset.with_more_channels(context_channels))
    network = _network(wider, stage, pretrained)
    torch.manual_seed(seed_of(run.config.seed, "initial weights", "context"))
    context = ContextNetwork(
        channels=run.dataset.image_shape[0], context_channels=context_channels, width=context_width, kernel_size=kernel_size
    ).to(run.device)
    return _train_arm(run, stage, ArmCml(network, context, task=run.dataset.task), training, domains)


def train_arm_bn(run: Run, stage: Stage, *, training: TrainingConfig, domains: int, pretrained: Network | None) -> Method:
    """See :class:`~dmoe.baselines.arm_bn.ArmBn` and :func:`~dmoe.baselines.arm_training.train_in_episodes`.

    Args:
        pretrained: the student whose weights are begun with; None: none.
    """
    return _train_arm(run, stage, ArmBn(_network(run, stage, pretrained), task=run.dataset.task), training, domains)


def train_arm_ll(
    run: Run, stage: Stage, *, training: TrainingConfig, domains: int, inner_lr: float, loss_width: int, pretrained: Network
) -> Method:
    """See :class:`~dmoe.baselines.arm_ll.ArmLl` and :func:`~dmoe.baselines.arm_training.train_in_episodes`.

    Args:
        pretrained: the student whose weights are begun with, and whose batch-norm statistics are kept.
    """
    network, task = _network(run, stage, pretrained), run.dataset.task
    torch.manual_seed(seed_of(run.config.seed, "initial weights", "learned loss"))
    loss = LossNetwork(num_outputs=task.num_outputs, width=loss_width).to(run.device)
    return _train_arm(run, stage, ArmLl(network, loss, task=task, inner_lr=inner_lr), training, domains)


def _train_arm(run: Run, stage: Stage, arm: Arm, training: TrainingConfig, domains: int) -> Method:
    support_size = run.config.meta.support_size

    def train() -> Progress:
        return train_in_episodes(
            stage=stage,
            arm=arm,
            split=run.source,
            task=run.dataset.task,
            training=training,
            support_size=support_size,
            domains=domains,
            # By the process that trains; others, if there are any, wait for the result.
            evaluate=lambda: replace(run, world=ALONE).evaluate(arm, "validation", Protocol(support_size)).score,
            checkpoint_every=run.config.checkpoint_every,
            seed=seed_of(run.config.seed, stage.name),
            device=run.device,
            workers=run.workers,
        )

    run.finished_or(train, stage, {"model": arm})
    return arm


def _network(run: Run, stage: Stage, pretrained: Network | None) -> Network:
    """The student's network as it begins, or with the weights of another; channels that the other lacks then count for nothing."""
    network = run.network(run.config.student_backbone, "student", to_train=pretrained is None and not stage.manifest.exists())
    if pretrained is not None:
        theirs = pretrained.state_dict()
        for name, ours in network.state_dict().items():
            _copy(theirs[name], ours)
    return network


@torch.no_grad()
def _copy(theirs: Tensor, ours: Tensor) -> None:
    if ours.shape == theirs.shape:
        ours.copy_(theirs)
    else:
        ours.zero_()[:, : theirs.shape[1]].copy_(theirs)
