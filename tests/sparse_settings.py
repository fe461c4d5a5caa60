"""Sparse settings for tests."""

from dataclasses import replace
from typing import Any

from torch import nn

from dmoe.models.sparse import SparseSettings
from dmoe.models.torchvision_import import torchvision

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


def four_blocks(shape: tuple[int, int, int]) -> nn.Module:
    """A transformer of four blocks and patches of 2x2, as timm has them."""
    torchvision()  # timm imports it
    from timm.models.vision_transformer import VisionTransformer

    channels, *size = shape
    how = {"num_classes": 0, "global_pool": "avg", "class_token": False, "embed_dim": 64, "depth": 4, "num_heads": 4}
    made: nn.Module = VisionTransformer(img_size=tuple(size), patch_size=2, in_chans=channels, **how)
    return made


def changed(settings: SparseSettings, **fields: Any) -> SparseSettings:
    return replace(settings, **fields)
