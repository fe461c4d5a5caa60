"""One typed, frozen configuration: YAML file, then command-line overrides, checked before any work starts."""

from dmoe.config.backbones import BackboneConfig, EMoEConfig, GMoEConfig
from dmoe.config.base import NO_STEPS, Duration, OptimizerConfig, TrainingConfig
from dmoe.config.objectives import DomainsConfig, ERMConfig, ObjectiveConfig, objective_of
from dmoe.config.reading import (
    CONFIG_FOLDER,
    differences,
    first_difference,
    known_datasets,
    load_config,
    read_fields,
    validate_config,
)
from dmoe.config.sections import (
    HOW_EXPERTS_ARE_LAUNCHED,
    LARGEST_EDGE,
    AggregatorConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ExpertsConfig,
    MetaConfig,
    StudentConfig,
    as_inputs,
)

__all__ = [
    "CONFIG_FOLDER",
    "HOW_EXPERTS_ARE_LAUNCHED",
    "LARGEST_EDGE",
    "NO_STEPS",
    "AggregatorConfig",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "DomainsConfig",
    "Duration",
    "EMoEConfig",
    "ERMConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "GMoEConfig",
    "MetaConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "StudentConfig",
    "TrainingConfig",
    "as_inputs",
    "differences",
    "first_difference",
    "known_datasets",
    "load_config",
    "objective_of",
    "read_fields",
    "validate_config",
]
