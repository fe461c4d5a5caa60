"""The methods of a comparison: the names that people know them by, their papers, the settings that are tried, and how each is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.artifacts import read_json
from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.baselines.unadapted import Unadapted
from dmoe.config import NO_STEPS, Duration, TrainingConfig
from dmoe.errors import UserError
from dmoe.evaluation import Method
from dmoe.model import load_as
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.run_folder import Stage
from dmoe.stages import Run, load_finished

Settings = Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """Where and for how long a method is trained, if it is.

    Attributes:
        run: a finished run, whose student, data and budget the method is given.
        stage: of the comparison of this method; trainings are folders in it.
        name: of the training.
        duration: of the training.
    """

    run: Run
    stage: Stage
    name: str = ""
    duration: Duration = NO_STEPS

    def training(self, *, lr: float | None = None) -> TrainingConfig:
        """As the student's own, but for its length and perhaps its learning rate."""
        own = self.run.config.student.training
        optimizer = own.optimizer.model_copy(update={} if lr is None else {"lr": lr})
        steps = self.duration.steps(1)
        every = Duration(max(1, -(-steps // 4)), "steps")
        return own.model_copy(update={"duration": self.duration, "evaluate_every": every, "optimizer": optimizer})

    def place(self, settings: Settings, **more: Any) -> Stage:
        """The stage of the training."""
        inputs = self.run.facts("student", settings=dict(settings), steps=str(self.duration), **more)
        return self.run.folder.stage(f"{self.stage.name}/{self.name}", inputs)

    @property
    def training_seconds(self) -> float | None:
        """CPU seconds that the training took; None where nothing was trained."""
        manifest: Path = self.stage.folder / self.name / "manifest.json"
        return float(read_json(manifest)["figures"]["cpu_seconds"]) if manifest.is_file() else None

    def source(self) -> Student:
        """The student that test-time methods adapt: plain supervised training, for as long as everything of ours together."""
        run, stage = self.run, self.run.folder.stage("compare/erm/full", {})
        network = run.network(run.config.student_backbone, "student", to_train=False)
        if not load_finished_weights(stage, network):
            raise UserError(f"{stage.folder}: the ERM student to adapt is not trained yet: compare erm first")
        return as_student(network, run)


@dataclass(frozen=True)
class Candidate:
    """A method that is compared.

    Attributes:
        name: as printed.
        paper: where it was published.
        make: the method with some settings, trained if it needs to be.
        tried: settings, the published or usual ones first.
        adapts_erm: at test time, to the domain, the ERM student that was trained as long as everything of ours together.
        by_image: it treats each image by itself, so that protocols change nothing but what is scored.
        beside: stages of the run that it needs, whose CPU time counts as its own.
        seen: the run as the method sees it.
        may_not_fit: some tasks and networks are none for it; it is left out there.
    """

    name: str
    paper: str
    make: Callable[[Trial, Settings], Method]
    tried: Sequence[Settings] = ({},)
    adapts_erm: bool = False
    by_image: bool = False
    beside: Sequence[str] = ()
    seen: Callable[[Run], Run] = lambda run: run
    may_not_fit: bool = False


def as_student(network: Network, run: Run) -> Student:
    return Student(features=network.features, head=network.head, task=run.dataset.task)
