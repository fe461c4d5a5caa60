"""The methods of a comparison: the names that people know them by, their papers, the settings that are tried, and how each is made.

Settings are a few around the published ones; what they mean is said where the method is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dmoe.adaptation import Adapter
from dmoe.artifacts import load_into, load_tensors, under_prefix
from dmoe.baselines.batch_statistics import BatchStatistics
from dmoe.baselines.eata import Eata
from dmoe.baselines.lame import Lame
from dmoe.baselines.memo import Memo
from dmoe.baselines.sar import Sar
from dmoe.baselines.shot_im import ShotIm
from dmoe.baselines.t3a import T3a
from dmoe.baselines.tent import Tent
from dmoe.baselines.unadapted import Unadapted
from dmoe.compare import training
from dmoe.compare.objectives import OBJECTIVES
from dmoe.config import NO_STEPS, Duration, EMoEConfig, GMoEConfig, TrainingConfig, objective_of
from dmoe.errors import DoesNotApply, UserError
from dmoe.evaluation import Method
from dmoe.meta.learner import ZeroTarget
from dmoe.meta_stage import meta_train_student
from dmoe.model import build_adapter, build_aggregator, load_as
from dmoe.models.networks import Network
from dmoe.models.student import Student
from dmoe.objectives import NAMES
from dmoe.randomness import generator
from dmoe.run import Run
from dmoe.run_folder import Stage, seconds_in
from dmoe.stages import load_experts, make_tokens, pretrain_aggregator, pretrain_student

Settings = Mapping[str, Any]

OF_THE_OPTIMIZER = ("lr", "max_gradient_norm")
"""Settings that are fields of :class:`~dmoe.config.OptimizerConfig`."""

IN_STEPS = {"annealed": "anneal_steps", "ramp": "ramp_steps"}
"""Settings that are a part of the whole training, and the fields of an objective that have it in steps."""

FULL = "full"
"""The name of the training that is tested; others are trials."""

ERM = f"compare/erm/{FULL}"
"""The stage of the student that test-time methods adapt."""

OURS = ("experts", "tokens", "aggregator", "student", "meta")
"""Stages of a run."""

LOOKS = 4
"""At the validation domains, in a whole training."""

SWAD_LOOKS = Duration(100, "steps")
"""Between its looks, in trials too, so that these tell its pace. The paper: 50 to 500 of 5,000 steps."""

FISHER_IMAGES = 2000
"""Source images of EATA, as published."""


@dataclass(frozen=True)
class Trial:
    """What a method is given, and where and for how long it is trained, if it is.

    Attributes:
        run: a finished run, whose student, data and budget the method has.
        stage: of the comparison of this method; trainings are folders in it.
        name: of the training.
        duration: of the training.
    """

    run: Run
    stage: Stage
    name: str = ""
    duration: Duration = NO_STEPS

    def training(self, settings: Settings, *, evaluate_every: Duration | None = None) -> TrainingConfig:
        """As the student's own, shorter or longer as a whole, but for what the settings say of its optimizer, and for looks at the
        validation domains.

        Args:
            evaluate_every: None: as usual.
        """
        own, steps = self.run.config.student.training, self.duration.steps(1)
        per_epoch = max(1, len(self.run.source) // own.batch_size)
        warmup = own.optimizer.warmup.steps(per_epoch) / max(1, own.duration.steps(per_epoch))  # of the whole
        changes = {key: settings[key] for key in OF_THE_OPTIMIZER if key in settings}
        optimizer = own.optimizer.model_copy(update={**changes, "warmup": Duration(round(warmup * steps), "steps")})
        # A trial, by whose pace the length of the whole training is reckoned, has no time for more than one look at validation.
        every = evaluate_every or Duration(max(1, -(-steps // LOOKS) if self.name == FULL else steps), "steps")
        return own.model_copy(update={"duration": self.duration, "evaluate_every": every, "optimizer": optimizer})

    def place(self, settings: Settings) -> Stage:
        """The stage of the training."""
        inputs = self.run.facts("student", settings=dict(settings), steps=str(self.duration))
        return Stage(self.stage.folder / self.name, inputs)

    @property
    def training_seconds(self) -> float | None:
        """CPU seconds that the training took, with those in its folder; None where nothing was trained."""
        return seconds_in(self.stage.folder / self.name)

    def pretrained(self) -> Network:
        """The run's student as supervised training left it."""
        return pretrain_student(self.run, only_load=True)

    def erm(self) -> Student:
        """The student that test-time methods adapt: trained plainly, for as long as everything of ours together.

        Raises:
            UserError: it is not there yet.
        """
        run, stage = self.run, self.run.folder.stage(ERM, {})
        if not stage.manifest.is_file():
            raise UserError(f"{stage.folder}: the ERM student to adapt is not trained yet: compare erm first")
        network = run.network(run.config.student_backbone, "student", to_train=False)
        load_into(network, under_prefix("model", load_tensors(stage.weights)[0]), where=str(stage.weights))
        return Student(features=network.features, head=network.head, task=run.dataset.task)


@dataclass(frozen=True)
class Candidate:
    """A method that is compared.

    Attributes:
        name: as printed.
        paper: where it was published.
        make: the method with some settings, trained if it needs to be; raises ``DoesNotApply`` where it is none for the task,
            the network or the data set.
        tried: settings, the published or usual ones first.
        by_image: it treats each image by itself, so that protocols change nothing but what is scored.
        beside: stages of the run that it goes on from or adapts, whose CPU time counts as its own.
        sparse: layers that the student's network has; None: none.
        told: whether images say which domain they are of.
    """

    name: str
    paper: str
    make: Callable[[Trial, Settings], Method]
    tried: Sequence[Settings] = ({},)
    by_image: bool = False
    beside: Sequence[str] = ()
    sparse: GMoEConfig | EMoEConfig | None = None
    told: bool = False

    def seen(self, run: Run) -> Run:
        """The run as the method sees it.

        Raises:
            DoesNotApply: its student cannot be sparse.
            UserError: nothing is known of the domains of its data set.
        """
        run = training.told_run(run) if self.told else run
        return training.sparse_run(run, sparse=self.sparse) if self.sparse else run

    @property
    def adapts_erm(self) -> bool:
        """Whether it adapts, at test time, the ERM student that was trained as long as everything of ours together."""
        return ERM in self.beside


def _oracle(trial: Trial, settings: Settings) -> Method:
    return training.train_oracle(trial.run, trial.place(settings), training=trial.training(settings))


def _objective(name: str, *, goes_on: bool = False) -> Callable[[Trial, Settings], Method]:
    """Training by an objective; settings are fields of it, or parts of the training, see :data:`IN_STEPS`.

    Args:
        goes_on: from the run's student as supervised training left it, which MIRO can stay near to if nothing else is pretrained.
    """

    def make(trial: Trial, settings: Settings) -> Method:
        if name == "miro" and goes_on != (trial.run.config.student_backbone.weights == "none"):
            raise DoesNotApply(
                "MIRO: the student begins with pretrained weights, and stays near to those"
                if goes_on
                else "MIRO: the student begins with random weights, and has no pretrained ones to stay near to"
            )
        own = {key: value for key, value in settings.items() if key not in (*OF_THE_OPTIMIZER, *IN_STEPS)}
        own |= {field: round(settings[key] * trial.duration.steps(1)) for key, field in IN_STEPS.items() if key in settings}
        how = trial.training(settings, evaluate_every=SWAD_LOOKS if name == "swad" else None)
        begun = trial.pretrained() if goes_on else None
        return training.train_plainly(
            trial.run, trial.place(settings), training=how, objective=objective_of(name, own), pretrained=begun
        )

    return make


def _arm(train: Callable[..., Method]) -> Callable[[Trial, Settings], Method]:
    """One of the three, which begin with the run's student as supervised training left it."""

    def make(trial: Trial, settings: Settings) -> Method:
        own = {key: value for key, value in settings.items() if key not in OF_THE_OPTIMIZER}
        return train(trial.run, trial.place(settings), training=trial.training(settings), pretrained=trial.pretrained(), **own)

    return make


def _eata(trial: Trial, settings: Settings) -> Method:
    source = trial.run.source
    chosen = torch.randperm(len(source), generator=generator(trial.run.config.seed, "eata"))[:FISHER_IMAGES]
    return Eata(trial.erm(), source=source.images(chosen), **settings)


def _ours(trial: Trial, settings: Settings) -> Adapter:
    run = trial.run
    times = settings.get("inner_lr_times", 1.0)
    update = {"inner_lr": times * run.config.meta.inner_lr, "inner_steps": settings.get("inner_steps", run.config.meta.inner_steps)}
    config = run.config.model_copy(update={"meta": run.config.meta.model_copy(update=update)})
    adapter = load_as(run.folder, config, device=run.device)
    adapter.ranges = None  # nothing is to be told, or to fall back to, where supports are small or from elsewhere
    return adapter


def _before(trial: Trial, settings: Settings) -> Method:
    return Unadapted(_ours(trial, settings).student)


def _zeros(trial: Trial, settings: Settings) -> Method:
    """Trained by the run's own meta-training, but for the target; the trial is the whole training, of which there is one."""
    run = trial.run
    run = replace(
        run,
        config=run.config.model_copy(
            update={"meta": run.config.meta.model_copy(update={"target": "zeros", "distill": "features"})}
        ),
    )
    experts, student, task = load_experts(run), trial.pretrained(), run.dataset.task
    aggregator = build_aggregator(run.config.aggregator, width=student.width, num_outputs=task.num_outputs).to(run.device)
    meta_train_student(run, make_tokens(run, experts), experts, aggregator, student, name=f"compare/zeros/{FULL}")
    return build_adapter(run.config, task, experts=experts, aggregator=ZeroTarget(), student=student, kind=Adapter)


def _ours_sparse(key: str) -> Callable[[Trial, Settings], Method]:
    """The run's own training with a sparse student; experts, tokens and the pretrained aggregator are the run's."""

    def make(trial: Trial, settings: Settings) -> Method:
        run, task, config = trial.run, trial.run.dataset.task, trial.run.config.student
        place = f"compare/{key}/{FULL}"
        pretrained = run.folder.stage(f"{place}/student", run.student_stage.inputs)
        student = training.network_trained_plainly(run, pretrained, training=config.training, objective=config.objective)
        experts = load_experts(run)
        tokens = make_tokens(run, experts)
        aggregator = pretrain_aggregator(run, tokens, student.width, only_load=True)
        meta_train_student(run, tokens, experts, aggregator, student, name=place, pretrained=f"{place}/student")
        return build_adapter(run.config, task, experts=experts, aggregator=aggregator, student=student, kind=Adapter)

    return make


LRS: Sequence[Settings] = ({}, {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 6e-3}, {"lr": 1e-2}, {"lr": 3e-2})
"""{}: as the run trains its student."""

ARM_PAPER = "Zhang et al., NeurIPS 2021"

SPARSE: Mapping[str, tuple[str, str, GMoEConfig | EMoEConfig]] = {
    "gmoe": ("GMoE", "Li et al., ICLR 2023", GMoEConfig()),
    "emoe": ("EMoE", "Qiu et al., 2023", EMoEConfig(experts=16)),  # which divide the hidden units of more networks than 24
}
"""Names, papers, and the layers in the student's network."""

CANDIDATES: Mapping[str, Candidate] = {
    "erm": Candidate(NAMES["erm"], "Vapnik, 1998", _objective("erm"), LRS, by_image=True),
    **{key: Candidate(NAMES[key], paper, _objective(key), tried, by_image=True) for key, (paper, tried) in OBJECTIVES.items()},
    "miro_of_student": Candidate(
        "MIRO, from the pretrained student",
        OBJECTIVES["miro"][0],
        _objective("miro", goes_on=True),
        OBJECTIVES["miro"][1],
        by_image=True,
        beside=["student"],
    ),
    **{
        key: Candidate(name, paper, _objective("erm"), LRS, by_image=True, sparse=sparse)
        for key, (name, paper, sparse) in SPARSE.items()
    },
    "arm_cml": Candidate(
        "ARM-CML",
        ARM_PAPER,
        _arm(training.train_arm_cml),
        [
            {"lr": lr, "domains": domains, "context_channels": 12, "context_width": 32, "kernel_size": kernel}
            for lr, domains, kernel in ((3e-3, 1, 3), (1e-3, 1, 3), (1e-2, 1, 3), (3e-3, 2, 3), (1e-2, 2, 3), (3e-3, 1, 5))
        ],
        beside=["student"],
    ),
    "arm_bn": Candidate(
        "ARM-BN",
        ARM_PAPER,
        _arm(training.train_arm_bn),
        [{"lr": lr, "domains": d} for lr, d in ((3e-3, 1), (1e-3, 1), (3e-4, 1), (1e-2, 1), (3e-3, 2), (1e-3, 2))],
        beside=["student"],
    ),
    "arm_ll": Candidate(
        "ARM-LL",
        ARM_PAPER,
        _arm(training.train_arm_ll),
        [
            {"lr": lr, "max_gradient_norm": 2.0, "domains": 1, "inner_lr": inner_lr, "loss_width": 32}
            for lr, inner_lr in ((1e-3, 0.1), (1e-3, 1.0), (3e-4, 1.0), (1e-3, 3.0), (3e-3, 1.0), (3e-3, 0.1))
        ],
        beside=["student"],
    ),
    "batch_statistics": Candidate(
        "ERM, batch statistics", "Nado et al., 2020", lambda trial, _: BatchStatistics(trial.erm()), beside=[ERM]
    ),
    "mixed_statistics": Candidate(
        "ERM, mixed statistics",
        "Schneider et al., NeurIPS 2020",
        lambda trial, settings: BatchStatistics(trial.erm(), **settings),
        [{"source_weight": weight} for weight in (16, 64, 128, 256, 512, 1024)],
        beside=[ERM],
    ),
    "tent": Candidate(
        "TENT",
        "Wang et al., ICLR 2021",
        lambda trial, settings: Tent(trial.erm(), **settings),
        [{"lr": lr, "steps": steps} for lr, steps in ((1e-3, 1), (1e-3, 10), (3e-3, 10), (1e-2, 10), (3e-3, 30), (2e-2, 10))],
        beside=[ERM],
    ),
    "shot_im": Candidate(
        "SHOT-IM",
        "Liang et al., ICML 2020",
        lambda trial, settings: ShotIm(trial.erm(), **settings),
        [{"lr": lr, "steps": steps} for lr, steps in ((1e-3, 15), (1e-2, 15), (1e-2, 30), (3e-2, 15), (3e-2, 30), (1e-1, 10))],
        beside=[ERM],
    ),
    "t3a": Candidate(
        "T3A",
        "Iwasawa & Matsuo, NeurIPS 2021",
        lambda trial, settings: T3a(trial.erm(), **settings),
        [{"supports_per_class": count} for count in (20, 1, 3, 5, 10, 100)],
        beside=[ERM],
    ),
    "memo": Candidate(
        "MEMO",
        "Zhang et al., NeurIPS 2022",
        lambda trial, settings: Memo(trial.erm(), **settings),
        [{"lr": lr, "augmentations": count} for lr, count in ((5e-3, 8), (1e-3, 8), (2e-2, 8), (5e-2, 8), (5e-3, 16), (2e-2, 16))],
        beside=[ERM],
        by_image=True,
    ),
    "lame": Candidate(
        "LAME",
        "Boudiaf et al., CVPR 2022",
        lambda trial, settings: Lame(trial.erm(), **settings),
        [
            {"affinity": kind, "neighbours": count}
            for kind, count in (("knn", 5), ("knn", 3), ("knn", 1), ("knn", 10), ("rbf", 5), ("rbf", 1))
        ],
        beside=[ERM],
    ),
    "eata": Candidate(
        "EATA",
        "Niu et al., ICML 2022",
        _eata,
        [
            {"lr": lr, "steps": steps, "redundant": redundant, "fisher_weight": weight}
            for lr, steps, redundant, weight in (
                (5e-3, 1, 0.4, 1.0),
                (5e-3, 10, 0.4, 1.0),
                (2e-2, 10, 0.4, 1.0),
                (5e-3, 10, 0.8, 1.0),
                (2e-2, 10, 0.8, 100.0),
                (2e-2, 30, 0.8, 1.0),
            )
        ],
        beside=[ERM],
    ),
    "sar": Candidate(
        "SAR",
        "Niu et al., ICLR 2023",
        lambda trial, settings: Sar(trial.erm(), **settings),
        [
            {"lr": lr, "steps": steps, "recovery": recovery}
            for lr, steps, recovery in (
                (2.5e-4, 1, 0.2),
                (1e-3, 10, 0.067),
                (1e-2, 10, 0.067),
                (3e-2, 10, 0.067),
                (1e-1, 10, 0.067),
                (3e-2, 10, 0.02),
            )
        ],
        beside=[ERM],
    ),
    "meta_dmoe": Candidate(
        "Meta-DMoE",
        "Zhong et al., NeurIPS 2022",
        _ours,
        [
            {"inner_lr_times": times, "inner_steps": steps}
            for times, steps in ((1.0, 1), (0.5, 1), (0.75, 1), (1.5, 1), (0.5, 2), (1.0, 2))
        ],
        beside=OURS,
    ),
    **{
        f"meta_dmoe_{key}": Candidate(
            f"Meta-DMoE, {name} student",
            f"Zhong et al., NeurIPS 2022; {paper}",
            _ours_sparse(f"meta_dmoe_{key}"),
            beside=("experts", "tokens", "aggregator"),
            sparse=sparse,
        )
        for key, (name, paper, sparse) in SPARSE.items()
    },
    "before": Candidate("Meta-DMoE before adapting", "Zhong et al., NeurIPS 2022", _before, by_image=True, beside=OURS),
    "zeros": Candidate("Meta-DMoE, target of zeros", "our control", _zeros, beside=["student"]),
    "oracle": Candidate("oracle: told the domain", "our control", _oracle, LRS, by_image=True, told=True),
}
"""By short names, in the order of the table."""

OF_OBJECTIVES = (*OBJECTIVES, "miro_of_student")

OF_SPARSE = (*SPARSE, *(f"meta_dmoe_{key}" for key in SPARSE))

GROUPS: Mapping[str, Sequence[str]] = {
    "usual": tuple(key for key in CANDIDATES if key in ("coral", "irm") or key not in (*OF_OBJECTIVES, *OF_SPARSE)),
    "objectives": ("erm", *OF_OBJECTIVES),
    "sparse": ("erm", "meta_dmoe", *OF_SPARSE),
}
"""Several methods by one name; ``usual`` is what is compared where none are named."""
