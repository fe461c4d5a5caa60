"""Networks, dense or sparse, as the configuration describes them."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from dmoe.config.base import Penalty, Section


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
