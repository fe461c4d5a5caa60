"""What every section of the configuration is made of, and how a network is trained."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

from dmoe.precision import Precision

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
