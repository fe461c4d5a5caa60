"""Networks as the configuration describes them."""

from dmoe.config import BackboneConfig, EMoEConfig, GMoEConfig
from dmoe.errors import UserError
from dmoe.models.networks import BY_OTHER_NAMES, Network, build_network
from dmoe.models.sparse import SparseSettings


def build_backbone(
    backbone: BackboneConfig, *, image_shape: tuple[int, int, int], num_outputs: int, to_train: bool = False
) -> Network:
    """A backbone with a fresh linear head, see :func:`~dmoe.models.networks.build_network`.

    Args:
        to_train: whether it starts from the backbone's weights; otherwise it is an empty vessel.
    """
    return build_network(
        backbone.name,
        image_shape=image_shape,
        num_outputs=num_outputs,
        weights=backbone.weights if to_train else "none",
        last_relu=backbone.last_relu,
        sparse=_settings(backbone),
    )


def _settings(backbone: BackboneConfig) -> SparseSettings | None:
    sparse: GMoEConfig | EMoEConfig | None = backbone.sparse
    if backbone.name in BY_OTHER_NAMES:
        sparse = sparse or GMoEConfig()
        if sparse.kind != "gmoe":
            dense = BY_OTHER_NAMES[backbone.name]
            raise UserError(f"backbone.sparse.kind: {backbone.name} is a gmoe, got {sparse.kind}: take it, or the name {dense}")
    if sparse is None:
        return None
    return SparseSettings(
        kind=sparse.kind,
        experts=sparse.experts,
        top_k=sparse.top_k,
        router=sparse.router,
        capacity_factor=sparse.capacity_factor,
        blocks=sparse.blocks,
        gate_noise=sparse.gate_noise,
        balance_weight=sparse.balance_weight,
        dropout=sparse.dropout,
        drop_path=sparse.drop_path,
    )
