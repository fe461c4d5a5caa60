"""What supervised training on several source domains minimises: a loss of the features and logits of a batch and its domains."""

from dmoe.objectives.base import Gradient, Objective, Outputs, gradient_of_loss
from dmoe.objectives.build import NAMES, build_objective
from dmoe.objectives.coral import CORAL, coral_penalty
from dmoe.objectives.dann import DANN
from dmoe.objectives.erm import ERM
from dmoe.objectives.fish import Fish
from dmoe.objectives.fishr import Fishr
from dmoe.objectives.group_dro import GroupDRO
from dmoe.objectives.irm import IRM, irm_penalty
from dmoe.objectives.miro import MIRO
from dmoe.objectives.mmd import MMD, mmd_penalty
from dmoe.objectives.swad import SWAD

__all__ = [
    "CORAL",
    "DANN",
    "ERM",
    "IRM",
    "MIRO",
    "MMD",
    "NAMES",
    "SWAD",
    "Fish",
    "Fishr",
    "Gradient",
    "GroupDRO",
    "Objective",
    "Outputs",
    "build_objective",
    "coral_penalty",
    "gradient_of_loss",
    "irm_penalty",
    "mmd_penalty",
]
