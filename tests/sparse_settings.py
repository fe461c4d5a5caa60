"""Sparse settings for tests."""

from dataclasses import replace
from typing import Any

from dmoe.models.sparse import SparseSettings

GMOE = SparseSettings(
    kind="gmoe",
    experts=6,
    top_k=1,
    router="cosine",
    capacity_factor=None,
    blocks="last_two",
    gate_noise=1.0,
    balance_weight=0.01,
    dropout=0.0,
    drop_path=0.0,
)
EMOE = replace(GMOE, kind="emoe", experts=8, top_k=3, router="average", gate_noise=0.0, balance_weight=0.0)


def changed(settings: SparseSettings, **fields: Any) -> SparseSettings:
    return replace(settings, **fields)
