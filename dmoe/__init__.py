"""Meta-DMoE: test-time adaptation to unseen domains by distilling domain experts (Zhong et al., NeurIPS 2022)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmoe.adaptation import Adapter
    from dmoe.diagnosis import Diagnosis
    from dmoe.errors import SuspectAdaptation, UserError
    from dmoe.model import Model, Single, load, load_single

__all__ = ["Adapter", "Diagnosis", "Model", "Single", "SuspectAdaptation", "UserError", "load", "load_single"]

_HOMES = {
    "Adapter": "dmoe.adaptation",
    "Diagnosis": "dmoe.diagnosis",
    "Model": "dmoe.model",
    "Single": "dmoe.model",
    "SuspectAdaptation": "dmoe.errors",
    "UserError": "dmoe.errors",
    "load": "dmoe.model",
    "load_single": "dmoe.model",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers ``-h`` without waiting for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dmoe' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
