"""What supervised training may minimise: a section each, told apart by its name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from dmoe.config.base import Penalty, Section


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
