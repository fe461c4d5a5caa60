"""Objectives by the name that the configuration gives them."""

from dmoe.config import objectives as settings
from dmoe.models.networks import Network
from dmoe.objectives.base import Objective
from dmoe.objectives.coral import CORAL
from dmoe.objectives.dann import DANN
from dmoe.objectives.erm import ERM
from dmoe.objectives.fish import Fish
from dmoe.objectives.fishr import Fishr
from dmoe.objectives.group_dro import GroupDRO
from dmoe.objectives.irm import IRM
from dmoe.objectives.miro import MIRO
from dmoe.objectives.mmd import MMD
from dmoe.objectives.swad import SWAD
from dmoe.tasks import Task

NAMES = {
    "erm": "ERM",
    "coral": "CORAL",
    "irm": "IRM",
    "mmd": "MMD",
    "dann": "DANN",
    "fish": "Fish",
    "fishr": "Fishr",
    "group_dro": "GroupDRO",
    "miro": "MIRO",
    "swad": "SWAD",
}
"""As people know them."""


def build_objective(config: settings.ObjectiveConfig, task: Task, *, network: Network, domains: list[int]) -> Objective:
    """The objective, for a network that is yet to be trained; its first weights are of torch's global random state.

    Args:
        domains: numbers of all source domains.
    """
    found: Objective
    match config:
        case settings.CORALConfig():
            found = CORAL(task, penalty=config.penalty)
        case settings.IRMConfig():
            found = IRM(task, penalty=config.penalty, anneal_steps=config.anneal_steps)
        case settings.MMDConfig():
            found = MMD(task, penalty=config.penalty)
        case settings.DANNConfig():
            found = DANN(
                task,
                features=network.width,
                domains=domains,
                penalty=config.penalty,
                ramp_steps=config.ramp_steps,
                width=config.classifier_width,
            )
        case settings.FishConfig():
            found = Fish(task, inner_lr=config.inner_lr)
        case settings.FishrConfig():
            found = Fishr(
                task,
                head=network.head,
                domains=domains,
                penalty=config.penalty,
                anneal_steps=config.anneal_steps,
                ema=config.ema,
            )
        case settings.GroupDROConfig():
            found = GroupDRO(task, domains=domains, weights_lr=config.weights_lr)
        case settings.MIROConfig():
            found = MIRO(task, features=network.features, width=network.width, penalty=config.penalty)
        case settings.SWADConfig():
            found = SWAD(
                task,
                network=network,
                start_patience=config.start_patience,
                end_patience=config.end_patience,
                tolerance=config.tolerance,
            )
        case settings.ERMConfig():
            found = ERM(task)
    return found
