"""One network trained alone, as the section ``student`` says, on all source domains: no experts, no tokens, nothing that adapts."""

from collections.abc import Mapping

import torch

from dmoe.baselines.unadapted import Unadapted
from dmoe.errors import UserError
from dmoe.evaluation import Method
from dmoe.model import describe
from dmoe.models.student import Student
from dmoe.objectives import NAMES
from dmoe.run import Run, load_finished, nothing_to_load
from dmoe.stages import check_objective, pretrain_student


def check_alone(run: Run, *, expert: int | None = None, tests: bool = False) -> None:
    """Find now what would otherwise be found after hours.

    Args:
        expert: a number that somebody asks to train.
        tests: whether the finished network is to be tested.

    Raises:
        UserError: what is asked for has no place in such a run, the objective does not fit the source domains, or weights cannot
            be fetched or read.
    """
    place = f"{run.folder.path}: method erm trains one network alone"
    if expert is not None:
        raise UserError(f"{place}: there are no experts to train")
    if run.published is not None:
        raise UserError(f"{place}: --checkpoint_dir, checkpoints of the paper's authors, does not go with it")
    if not tests and {"experts", "aggregator"} & set(run.given):
        raise UserError(f"{place}: there are no experts and no aggregator to load")
    finished = run.student_stage.manifest.exists()
    if not tests and "student" in run.given and not finished:
        raise nothing_to_load(run.student_stage.folder)
    if not finished:
        check_objective(run, "student", torch.arange(len(run.source)), run.config.student)
    run.network(run.config.student_backbone, "check", to_train=not (tests or finished))  # fetches pretrained weights


def train_alone(run: Run, *, only_load: bool = False) -> None:
    """Train the network, or take the finished one."""
    pretrain_student(run, only_load=only_load)
    run.first(lambda: describe(run.folder, run.dataset))


def trained_alone(run: Run) -> Mapping[str, Method]:
    """The finished network as it is, by the name of what it minimised.

    Raises:
        UserError: it is missing.
    """
    network = run.network(run.config.student_backbone, "student", to_train=False)
    if not load_finished(run.student_stage, {"model": network}):
        raise UserError(f"{run.student_stage.folder}: the network is not trained yet: python run.py --run_dir {run.folder.path}")
    student = Student(features=network.features, head=network.head, task=run.dataset.task)
    return {NAMES[run.config.student.objective.name]: Unadapted(student)}
