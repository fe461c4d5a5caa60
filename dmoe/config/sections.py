"""The sections of a run, and all of them together."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from dmoe.config.backbones import BackboneConfig
from dmoe.config.base import BatchSize, Count, Duration, Gigabytes, OptimizerConfig, Section, Seed, TrainingConfig
from dmoe.config.objectives import ERMConfig, ObjectiveConfig
from dmoe.precision import Precision

LARGEST_EDGE = 4096
"""Pixels of an image as networks see it."""

HOW_EXPERTS_ARE_LAUNCHED = ("threads", "retries", "slurm_options")
"""Fields of ``experts`` that decide where and how fast experts train, but not what becomes of them."""


class DataConfig(Section):
    dir: Path | None = None
    """Where the data set lies (for folders also a CSV file); null: ./data. The embedded one needs none."""
    seed: Seed = 0
    """Makes the stored views of the embedded data set, and draws validation images; a run's own seed leaves the data alone."""
    source_images_per_domain: Count | None = None
    """Train on so many images of each source domain at most, its first ones, to try things out; null: on all."""
    image_size: Annotated[int, Field(ge=8, le=LARGEST_EDGE)] | None = None
    """Edge that images are resized to, in pixels; null: the data set's own, for folders 224."""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Processes that read images ahead; 0: none; null: as many as CPU threads where images lie in files."""
    decoded_gb: Gigabytes | None = None
    """Disk for images as they were decoded, so that each is decoded once and not in every epoch of every stage; 0: none; null: half
    of the machine's memory, from where they are then read. Only crops are always made from the files."""
    decoded_dir: Path | None = None
    """Where they are kept, for all runs that read the same files; null: .decoded beside the data. May be deleted at any time."""
    skip_unreadable: bool = False
    """Read every image once at the start, and leave out those that cannot be read; false: the first such image is an error."""
    angles: Literal["between", "beyond"] = "between"
    """digits only: how scanners tested on turn the sheet: between those trained on, or by 110 to 130 degrees after 0 to 90."""
    fold: Literal["A", "B", "C", "D", "E"] = "A"
    """poverty only: which countries are source, validation and target."""
    target_domains: tuple[str, ...] = ()
    """folders only: names of the domains to be tested on."""
    validation_domains: tuple[str, ...] = ()
    """folders only: names of the domains to choose on; none: validation_fraction of the source images is held out for it."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """folders only, see validation_domains."""
    labels: Literal["classes", "values"] = "classes"
    """folders with a CSV only: values make it a regression."""
    channels: Literal[1, 3] = 3
    """folders only: 1 reads pictures as grey."""
    augmentation: Literal["none", "turns", "crops"] = "none"
    """folders only: of source images. turns: by 90 degrees and mirrored; crops: as DomainBed."""

    @field_validator("target_domains", "validation_domains", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        """One name need not be a list, and names that look like numbers are names."""
        listed = names if isinstance(names, list | tuple) else [names]
        return [str(name) if isinstance(name, int | float | date) else name for name in listed]


class TokensConfig(Section):
    batch_size: BatchSize = 500
    """Images in one pass through the experts; halved by itself where a GPU's memory is too small."""
    storage: Literal["float32", "float16", "bfloat16"] = "float32"
    """How tokens are kept. The other two take half the disk and lose digits, see docs/performance.md."""
    precision: Precision = "float32"
    """bfloat16: experts are asked by autocast, for tokens and when adapting."""
    views: Literal["all", "first"] = "all"
    """Which stored views of a source image get tokens, where it has several (rxrx1: eight turns). Others are not distilled."""
    last_relu: bool | None = None
    """DenseNet only: ReLU after the last norm where features are taken; null: as the experts were trained. Holds for the
    student too, whose features are to become like theirs. The public code trains the experts with it and takes features without."""


class AggregatorConfig(Section):
    pooling: Literal["transformer", "mean", "max"] = "transformer"
    """How an image's tokens become one: the mean of what a transformer makes of them, or their mean or maximum as they are. Depth,
    heads and dropout are the transformer's; without it nothing but an output map learns."""
    depth: Annotated[int, Field(ge=1, le=64)] = 1
    heads: Annotated[int, Field(ge=1, le=4096)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """In its pretraining only."""
    output_map: bool = False
    """An affine map behind the pooling, fitted onto the pretrained student's features. Not in the paper."""
    training: TrainingConfig


class ExpertsConfig(Section):
    count: Annotated[int, Field(ge=2, le=10_000)]
    """N. Two at least, because an image's own expert is left out in training."""
    partition: Literal["shuffled", "interleaved"] = "shuffled"
    """shuffled: runs of the shuffled source domains (the public code). interleaved: domain number modulo N."""
    backbone: BackboneConfig
    training: TrainingConfig
    objective: ObjectiveConfig = ERMConfig()
    """What each minimises on its own domains, see ``student.objective``."""
    threads: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPU threads of each expert's process; the number of processes follows from it."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often an expert whose process was killed or failed goes on from its last checkpoint, before the run gives it up."""
    slurm_options: tuple[str, ...] = ()
    """--launcher slurm only: further options of sbatch, for example ["--partition=gpu", "--time=24:00:00"]."""

    @field_validator("slurm_options", mode="after")
    @classmethod
    def _on_one_line(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("-") or not option.isprintable() or "\\" in option:
                raise ValueError("must be options of sbatch, each '--name=value' on one line, without backslashes")
        return options


class StudentConfig(Section):
    backbone: BackboneConfig | None = None
    """null: the experts', as tokens are taken from them. Its features must be as wide as theirs."""
    training: TrainingConfig
    objective: ObjectiveConfig = ERMConfig()
    """What its pretraining minimises: fields of its own, and a name: erm, coral, irm, mmd, dann, fish, fishr, group_dro, miro or
    swad."""


class MetaConfig(Section):
    """Bi-level training in episodes."""

    duration: Duration
    domains_per_update: Count = 1
    """Episodes whose gradients are averaged (the public code: 1; the paper's text: several)."""
    support_size: Count
    """Unlabeled images to adapt to."""
    query_size: Count
    """Labeled images of the same domain to judge the adapted student by."""
    inner_lr: Annotated[float, Field(gt=0)]
    inner_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    inner_loss: Literal["mean_square", "norm"] = "mean_square"
    """Distance of features and target: the squared difference, averaged over all entries (the public code), or the length of
    the difference, averaged over images (the paper's text)."""
    mask: Literal["remove", "zero", "none"] = "remove"
    """What happens to the token of the expert that knows the episode's domain (code: remove; text: zero)."""
    target: Literal["aggregator", "zeros"] = "aggregator"
    """zeros: a control; the student adapts towards nothing, and no expert is asked."""
    distill: Literal["features", "logits", "both"] = "features"
    """What an inner step brings together: the student's features and the target; their logits, by the student's head and by the
    aggregator's, which then learns too; or both, the sum of the two losses. Only the student's features are stepped."""
    learns: Literal["both", "aggregator", "student"] = "both"
    """Which of the two is meta-trained; the other one stays as pretraining left it."""
    student_start: Literal["pretrained", "random"] = "pretrained"
    """random: meta-training starts from fresh weights, and from batch-norm statistics that never saw an image."""
    student: OptimizerConfig
    aggregator: OptimizerConfig
    restart_optimizers: bool = False
    """Forget Adam's moments at each epoch, as the public code does."""
    gradient: Literal["auto", "forward_over_reverse", "reverse_over_reverse", "double_backward"] = "auto"
    """Ways to the same exact gradient. auto: what fits into memory_gb and, tried on this machine, is fastest. The next two keep no
    graph of the inner steps; the second of them is for networks with operators that have no forward-mode derivatives; the last
    keeps the whole graph, which is fastest where it fits."""
    chunk_size: Count | None = None
    """Images of an episode that are differentiated at a time, where no graph is kept; memory grows with it. null: all, or as auto
    finds."""
    memory_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """What auto lets an update take beside the networks; null: 80 % of the GPU's memory, or half of the machine's."""
    precision: Precision = "float32"
    """bfloat16: episodes by autocast; adapting, also in validation, stays in float32."""
    evaluate_every: Duration = Duration(0.5, "epochs")

    @field_validator("distill")
    @classmethod
    def _of_an_aggregator(cls, distill: str, info: ValidationInfo) -> str:
        if distill != "features" and info.data.get("target") == "zeros":
            raise ValueError("must be features where meta.target is zeros")
        return distill


class EvaluationConfig(Section):
    support_size: Count | None = None
    """Images of a target domain to adapt to; null: meta.support_size."""
    score_support: bool = True
    """Whether the support images count in the metrics (the public code: yes; the paper's text: no)."""
    batch_size: BatchSize = 500
    """Images predicted at a time."""
    expert_batch_norm: Literal["running", "batch"] = "running"
    """Statistics that the experts normalise by; batch: as the public code's --test entry."""
    on_suspect: Literal["keep", "warn", "fall_back"] = "warn"
    """Where adapting to a domain goes otherwise than in training episodes: use the adapted student; use it and say so; or use the
    unadapted one."""


class CompareConfig(Section):
    """What --compare does with every method."""

    methods: tuple[str, ...] = ()
    """Short names, for example [erm, tent, meta_dmoe], or groups of them: usual; objectives, which is ERM and all that students
    can be trained by; sparse, for students that are transformers: ERM and Meta-DMoE with dense and sparse ones; none: usual."""
    trials: Annotated[int, Field(ge=1, le=1000)] = 6
    """Settings tried on the validation domains, of each method at most so many."""
    trial_share: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Length of a training that tries a setting, as part of the CPU time of all stages of a run together."""
    support_sizes: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Unlabeled images of a target domain to adapt to, beside the run's own number."""
    stream_images: Count | None = 256
    """Images of each target domain, its first ones, that come in batches, where a method adapts to each of them; null: all."""


class Config(Section):
    """Everything that decides a run's numbers, and nothing else."""

    dataset: str
    preset: str = ""
    """Which of the file's named sets of values this is, where it has several."""
    seed: Seed = 1
    method: Literal["meta_dmoe", "erm"] = "meta_dmoe"
    """meta_dmoe: all stages. erm: one network alone, as the section student says, tested unadapted; sections of other stages
    count for nothing."""
    checkpoint_every: Count = 500
    """Steps between checkpoints, beside those at each evaluation."""
    data: DataConfig = DataConfig()
    experts: ExpertsConfig
    tokens: TokensConfig = TokensConfig()
    aggregator: AggregatorConfig
    student: StudentConfig
    meta: MetaConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    compare: CompareConfig = CompareConfig()

    @property
    def token_backbone(self) -> BackboneConfig:
        """The experts as tokens are taken from them."""
        if self.tokens.last_relu is None:
            return self.experts.backbone
        return self.experts.backbone.model_copy(update={"last_relu": self.tokens.last_relu})

    @property
    def student_backbone(self) -> BackboneConfig:
        return self.student.backbone or self.token_backbone

    @property
    def support_size(self) -> int:
        """Support images at test time."""
        return self.evaluation.support_size or self.meta.support_size

    @property
    def trains_one(self) -> bool:
        """Whether there are no experts, and nothing adapts."""
        return self.method == "erm"


LATER_FIELDS = {
    "aggregator": ("pooling",),
    "experts": ("objective",),
    "meta": ("distill", "learns", "student_start"),
    "student": ("objective",),
}
"""Fields of sections that earlier runs were made without, and whose defaults say what was done then."""


def as_inputs(config: Config) -> dict[str, Any]:
    """The configuration as stages record it: plain, without later fields at their defaults, so that earlier runs stay finished."""
    plain = config.model_dump(mode="json")
    for section, names in LATER_FIELDS.items():
        values = getattr(config, section)
        for name in names:
            if getattr(values, name) == type(values).model_fields[name].default:
                del plain[section][name]
    return plain
