"""One typed, frozen configuration: YAML file, then command-line overrides, checked before any work starts."""

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import core_schema

from dmoe.errors import UserError, shortened
from dmoe.precision import Precision
from dmoe.reading import read_text

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"

LARGEST_FILE = 1 << 17
"""Bytes of a configuration; a file of that size takes a second or two to be read."""

LARGEST_EDGE = 4096
"""Pixels of an image as networks see it."""

MERGED_AT_MOST = 10_000
"""Fields of a section that is put together of others by YAML's ``<<``."""

Count = Annotated[int, Field(ge=1, le=1 << 30)]
BatchSize = Annotated[int, Field(ge=1, le=1 << 20)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Gigabytes = Annotated[float, Field(ge=0, le=1e6)]
Penalty = Annotated[float, Field(ge=0, le=1e9)]


@dataclass(frozen=True)
class Duration:
    """A number of steps or epochs, written with its unit: ``400 steps``, ``12 epochs``, ``0.5 epochs``."""

    count: float
    unit: Literal["steps", "epochs"]

    def steps(self, steps_per_epoch: int) -> int:
        """This many optimizer steps, where an epoch has ``steps_per_epoch``."""
        return round(self.count * (steps_per_epoch if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        whole = float(self.count).is_integer()
        return f"{int(self.count) if whole else self.count} {self.unit}"

    @classmethod
    def parse(cls, text: Any) -> "Duration":
        if isinstance(text, Duration):
            return text
        number, _, unit = (text.strip() if isinstance(text, str) else "").partition(" ")
        unit = {"step": "steps", "epoch": "epochs"}.get(unit.strip(), unit.strip())
        try:
            count = float(number)
        except ValueError:
            count = -1
        if unit not in ("steps", "epochs") or not 0 <= count <= 1e9:
            raise ValueError("must be a number and a unit, such as '400 steps' or '12 epochs', at most 1e9")
        return cls(count, unit)  # type: ignore[arg-type]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


NO_STEPS = Duration(0, "steps")

HOW_EXPERTS_ARE_LAUNCHED = ("threads", "retries", "slurm_options")
"""Fields of ``experts`` that decide where and how fast experts train, but not what becomes of them."""


class Section(BaseModel):
    """Fields that nobody may misspell or change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class OptimizerConfig(Section):
    """Adam and how its learning rate moves."""

    lr: Annotated[float, Field(gt=0)]
    """Learning rate at its highest."""
    l2: Annotated[float, Field(ge=0)] = 0.0
    """L2 added to the gradient (Adam's weight_decay)."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    decay_per_epoch: Annotated[float, Field(gt=0, le=1)] = 0.96
    """Factor of the exponential schedule, applied once an epoch."""
    warmup: Duration = NO_STEPS
    """Linear rise from 0 to ``lr``, before the schedule; a cosine falls from there to 0 at the end."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down to this L2 norm; null: never."""


class TrainingConfig(Section):
    """One run of the supervised loop."""

    batch_size: BatchSize
    """Images in a step."""
    duration: Duration
    optimizer: OptimizerConfig
    evaluate_every: Duration = Duration(1, "epochs")
    """Validation, and the choice of the best checkpoint."""
    precision: Precision = "float32"
    """bfloat16: autocast in training, for GPUs that are faster in it; validation stays in float32."""


class SparseConfig(Section):
    """Feed-forward parts of many experts, few of which work on a patch; see docs/sparse.md."""

    capacity_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """An expert takes so many times an equal share of a batch's patches at most, which makes what is said of an image depend on
    those beside it; null: all that come."""
    blocks: tuple[int, ...] | str = "last_two"
    """last_two: the second and fourth block from the end; every_two: all that are even numbers of blocks from these; or a list of
    numbers, from 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the experts' hidden units, in supervised training."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """How often the last block is left out for an image in supervised training; blocks before it less, the first never."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _named_or_numbered(cls, blocks: Any) -> Any:
        numbers = isinstance(blocks, list | tuple) and blocks and all(type(number) is int and number >= 0 for number in blocks)
        if not numbers and blocks not in ("last_two", "every_two"):
            raise ValueError("must be last_two, every_two or a list of block numbers")
        return blocks


class GMoEConfig(SparseConfig):
    """Experts are copies of the feed-forward part, and a router is learned."""

    kind: Literal["gmoe"] = "gmoe"
    experts: Annotated[int, Field(ge=2, le=4096)] = 6
    top_k: Annotated[int, Field(ge=1, le=4096)] = 1
    """Experts that work on a patch."""
    router: Literal["cosine", "linear"] = "cosine"
    gate_noise: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Standard deviation of the noise on the router's logits, times experts, in supervised training."""
    balance_weight: Penalty = 0.01
    """Of each layer's balance loss, in supervised training; must be 0 where gate_noise is."""


class EMoEConfig(SparseConfig):
    """Experts share out the hidden units of the feed-forward part."""

    kind: Literal["emoe"] = "emoe"
    experts: Annotated[int, Field(ge=2, le=4096)] = 24
    """Must divide the hidden units."""
    top_k: Annotated[int, Field(ge=1, le=4096)] = 4
    """Experts that work on a patch."""
    router: Literal["average", "cosine"] = "average"
    """average: the mean of an expert's rows of W1, not learned, and a weight of 1 for each; cosine: learned."""
    gate_noise: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """See gmoe."""
    balance_weight: Penalty = 0.0
    """See gmoe."""


class BackboneConfig(Section):
    name: str
    """small_conv, small_vit, resnet18, resnet50, densenet121, mobilenet_v2, timm:<model>, or gmoe_vit_s16, gmoe_vit_b16."""
    weights: str = "none"
    """none (random), pretrained (the library's), or a file of feature tensors."""
    last_relu: bool = True
    """DenseNet only: ReLU after the last norm, as torchvision has it; see also tokens.last_relu."""
    sparse: GMoEConfig | EMoEConfig | None = Field(default=None, discriminator="kind")
    """Vision transformers only: fields of its own, and a kind: gmoe or emoe; null: dense, but gmoe for gmoe_vit_*."""

    @field_validator("sparse")
    @classmethod
    def _fitting(cls, sparse: GMoEConfig | EMoEConfig | None) -> GMoEConfig | EMoEConfig | None:
        if sparse is not None and sparse.top_k > sparse.experts:
            raise ValueError(f"must have top_k <= experts, {sparse.top_k} is more than {sparse.experts}")
        if sparse is not None and sparse.balance_weight and not sparse.gate_noise:
            raise ValueError("must have balance_weight 0 where gate_noise is 0: balance is measured under that noise")
        return sparse

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a later field at its default, so that earlier runs stay finished."""
        plain: dict[str, Any] = handler(self)
        if self.sparse is None:
            del plain["sparse"]
        return plain


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


class ERMConfig(Section):
    """The task loss alone."""

    name: Literal["erm"] = "erm"


class DomainsConfig(Section):
    """What compares domains."""

    domains: Annotated[int, Field(ge=2, le=10_000)] = 4
    """Source domains that a batch has images of, equally many of each."""


class CORALConfig(DomainsConfig):
    name: Literal["coral"] = "coral"
    penalty: Penalty = 1.0
    """Weight of the differences of means and covariances."""


class IRMConfig(DomainsConfig):
    name: Literal["irm"] = "irm"
    penalty: Penalty = 100.0
    """Weight of what domains would gain by a scale of their own, after anneal_steps; 1 until then."""
    anneal_steps: Annotated[int, Field(ge=0, le=1 << 30)] = 500


class MMDConfig(DomainsConfig):
    name: Literal["mmd"] = "mmd"
    penalty: Penalty = 1.0
    """Weight of the kernels' distance of the domains."""


class DANNConfig(DomainsConfig):
    name: Literal["dann"] = "dann"
    penalty: Penalty = 1.0
    """Weight of the reversed gradient of the classifier of domains."""
    ramp_steps: Annotated[int, Field(ge=0, le=1 << 30)] = 0
    """Steps in which that weight rises from 0; the paper: the whole training."""
    classifier_width: Annotated[int, Field(ge=1, le=1 << 16)] = 256
    """Of its two hidden layers."""


class FishConfig(DomainsConfig):
    name: Literal["fish"] = "fish"
    inner_lr: Annotated[float, Field(gt=0)] = 0.01
    """Of the steps from domain to domain."""


class FishrConfig(DomainsConfig):
    name: Literal["fishr"] = "fishr"
    penalty: Penalty = 1000.0
    """Weight of the differences of the gradients' variances, after anneal_steps; 0 until then."""
    anneal_steps: Annotated[int, Field(ge=0, le=1 << 30)] = 1500
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """What stays of the moving averages of variances in a step."""


class GroupDROConfig(DomainsConfig):
    name: Literal["group_dro"] = "group_dro"
    weights_lr: Annotated[float, Field(ge=0, le=1e3)] = 0.01
    """How fast the weights of domains with a high loss grow."""


class MIROConfig(Section):
    """Its backbone should have pretrained weights, which it stays near to."""

    name: Literal["miro"] = "miro"
    penalty: Penalty = 0.1
    """Weight of how unlikely the pretrained features are."""


class SWADConfig(Section):
    """The weights of a window of steps, averaged; it looks at the validation loss at every evaluation."""

    name: Literal["swad"] = "swad"
    start_patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations, of which the first has the lowest loss, that begin the window."""
    end_patience: Annotated[int, Field(ge=1, le=1000)] = 6
    """Evaluations in a row with too high a loss, before which the window ends."""
    tolerance: Annotated[float, Field(ge=1, le=1e3)] = 1.3
    """How many times the mean loss of the window's first evaluations is not yet too high."""


ObjectiveConfig = Annotated[
    ERMConfig
    | CORALConfig
    | IRMConfig
    | MMDConfig
    | DANNConfig
    | FishConfig
    | FishrConfig
    | GroupDROConfig
    | MIROConfig
    | SWADConfig,
    Field(discriminator="name"),
]


def objective_of(name: str, fields: Mapping[str, Any]) -> ObjectiveConfig:
    """An objective by its name, with these fields and its defaults; a pydantic ``ValidationError`` where it has none such."""
    found: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python({"name": name, **fields})
    return found


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
    """Short names, for example [erm, tent, meta_dmoe], or groups of them: usual, and objectives, which is ERM and all that students
    can be trained by; none: usual."""
    trials: Annotated[int, Field(ge=1, le=1000)] = 6
    """Settings tried on the validation domains, of each method at most so many."""
    trial_share: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Length of a training that tries a setting, as part of the CPU time of all stages of a run together."""
    support_sizes: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Unlabeled images of a target domain to adapt to, beside the run's own number."""
    stream_images: Count | None = 320
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


def load_config(path: Path, overrides: Sequence[str] = (), **flags: Any) -> Config:
    """Read a YAML file, choose its preset, apply ``key.sub=value`` overrides and then flags that are not None.

    The file's own values are one preset, named by its field ``preset``; ``presets`` names others and what they change.

    Raises:
        UserError: the file is missing or not YAML, a field is unknown or missing, or a value is out of its range; the line
            names the place, the field and the value.
    """
    content = read_fields(path)
    changes = [_parse(text) for text in overrides]
    try:
        content = _choose_preset(content, dict(changes).get("preset"), str(path))
    except RecursionError:  # two sections, each of which holds itself
        raise UserError(f"{path}: it is nested too deeply") from None
    origins: dict[tuple[str, ...], str] = {}
    for key, value in changes:
        _set(content, tuple(key.split(".")), value, origins)
    for key, value in flags.items():
        if value is not None:
            _set(content, tuple(key.split("__")), value, origins)
    return validate_config(content, str(path), origins)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, unchecked.

    Raises:
        UserError: the file is missing, or not YAML that holds fields.
    """
    try:
        content = _parsed(read_text(path, at_most=LARGEST_FILE))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration; known: {', '.join(known_datasets())}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as YAML: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold fields such as 'seed: 1', got {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Plain data, and no more of it than the text is long."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MERGED_AT_MOST:  # sections that take one another in twice double their size each time
            raise yaml.constructor.ConstructorError(None, None, f"more than {MERGED_AT_MOST} merged fields", node.start_mark)


def _parsed(text: str) -> Any:
    """Plain data of YAML.

    Raises:
        ValueError: it is none; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # PyYAML checks little
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def validate_config(content: Mapping[str, Any], place: str, origins: Mapping[tuple[str, ...], str] | None = None) -> Config:
    """A Config of plain data; its first fault becomes a UserError that names the place it came from."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(error, place, origins or {})) from None
    except RecursionError:
        raise UserError(f"{place}: it is nested too deeply") from None


def known_datasets() -> list[str]:
    """Names of data sets for which a configuration is shipped; other configurations there are examples, for ``--config``."""
    paths = CONFIG_FOLDER.glob("*.yaml")
    return sorted(path.stem for path in paths if yaml.safe_load(path.read_text(encoding="utf-8"))["dataset"] == path.stem)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted fields in which two plain configurations differ, as ``meta.inner_lr: 1.0 there, 0.2 here``."""
    found = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} here")
    return found


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first of :func:`differences` and how many more there are; empty where there are none."""
    found = differences(one, other)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more}" if found else ""


def _parse(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"command line: overrides look like meta.inner_lr=0.2, got {override!r}")
    try:
        return key, _parsed(value)
    except ValueError:
        raise UserError(f"command line: the value of {key} is not valid YAML: {value!r}") from None


def _choose_preset(content: dict[str, Any], asked: str | None, place: str) -> dict[str, Any]:
    presets = content.pop("presets", {})
    if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
        raise UserError(f"{place}: presets must hold named sets of fields")
    own = content.get("preset", "")
    if asked is None or asked == own:
        return content
    if not isinstance(asked, Hashable) or asked not in presets:
        known = ", ".join(name for name in (own, *presets) if name and isinstance(name, str)) or "none"
        raise UserError(f"command line: preset {asked!r} is unknown in {place}; known there: {known}")
    return _merged(content, presets[asked])


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _set(content: dict[str, Any], keys: tuple[str, ...], value: Any, origins: dict[tuple[str, ...], str]) -> None:
    section = content
    for key in keys[:-1]:
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"command line: {'.'.join(keys)}: {key} is a single value, it has no fields")
        section[key] = dict(inner or {})  # a copy: two sections may share one by a YAML anchor
        section = section[key]
    section[keys[-1]] = value
    origins[keys] = "command line"


_PHRASES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be one of {expected}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "finite_number": "must be a finite number",
    "union_tag_invalid": "must be one of {expected_tags}",
}


def _explain(error: ValidationError, place: str, origins: Mapping[tuple[str, ...], str]) -> str:
    fault = error.errors()[0]
    keys, section = _walked(fault["loc"])
    if fault["type"].startswith("union_tag"):  # of sections that are told apart by their name or kind
        keys = (*keys, fault["ctx"]["discriminator"].strip("'"))
    for end in range(len(keys), 0, -1):
        if keys[:end] in origins:
            place = origins[keys[:end]]
            break
    name = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        place = next((origin for changed, origin in origins.items() if changed[: len(keys)] == keys), place)
        return f"{place}: {name} is not a field; known here: {', '.join(section.model_fields)}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return f"{place}: {name} is missing"
    phrase = _PHRASES.get(fault["type"], "{msg}").format(msg=fault["msg"].removeprefix("Value error, "), **fault.get("ctx", {}))
    value = fault["ctx"]["tag"] if fault["type"] == "union_tag_invalid" else fault["input"]
    return f"{place}: {name} {phrase}, got {_shown(value)}"


def _shown(value: Any) -> str:
    """A value from a file, which may be of any size: by YAML's references, larger than memory."""
    if isinstance(value, Mapping | Set) or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        return f"{type(value).__name__} of {len(value)}" if value else repr(value)
    return shortened(hex(value) if isinstance(value, int) and abs(value) >= 1 << 999 else repr(value), 200)


def _tag(section: type[BaseModel]) -> Any:
    """What tells a section from others that could stand in its place."""
    return next((section.model_fields[name].default for name in ("kind", "name") if name in section.model_fields), None)


def _walked(location: Sequence[int | str]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The fields that a fault's location names, and the section that the last of them is in, or would be.

    Where a section is one of several by its name or kind, that is a part of the location too, but no field.
    """
    keys: list[str] = []
    section: type[BaseModel] = Config
    candidates: list[type[BaseModel]] = [Config]
    for key in map(str, location):
        named = [each for each in candidates if len(candidates) > 1 and _tag(each) == key]
        if named:
            candidates = named
            continue
        keys.append(key)
        if candidates:
            section = candidates[0]
        inner = section.model_fields[key].annotation if candidates and key in section.model_fields else None
        either = (inner, *getattr(inner, "__args__", ()))
        candidates = [each for each in either if isinstance(each, type) and issubclass(each, BaseModel)]
    return tuple(keys), section
