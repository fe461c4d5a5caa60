"""The transformer that turns the tokens of one image into the feature its student should have.

Notation: B images, N experts, D feature width, K classes; tokens ``[B, N, D]``, targets ``[B, D]``.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["transformer", "mean", "max"]


class Block(nn.Module):
    """Pre-norm self-attention over the experts, then a perceptron twice as wide: ``[B, N, D] -> [B, N, D]``."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attention_norm(tokens)
        # With weights asked for, attention is plain matrix products: the fused kernels cannot be differentiated twice.
        tokens = tokens + self.attention(x, x, x, need_weights=True)[0]
        mixed: Tensor = tokens + self.perceptron(self.perceptron_norm(tokens))
        return mixed

    def weights(self, tokens: Tensor) -> Tensor:
        """How much of each token goes into each other, by head: ``[B, heads, N, N]``, each row sums to 1."""
        x = self.attention_norm(tokens)
        weights: Tensor = self.attention(x, x, x, need_weights=True, average_attn_weights=False)[1]
        return weights


class Aggregator(nn.Module):
    """Tokens to target feature. There is no positional embedding: the experts are a set.

    Source: Zhong et al. 2022, section 3.2; depth, heads and widths as in the public code.

    Attributes:
        head: used in pretraining, to learn from labels, and where logits are distilled.
        output_map: an affine map behind the pooling, or None. It is our addition: fitted onto the features of the pretrained
            student, it makes the first inner steps harmless (see :meth:`fit_output_map`).
    """

    def __init__(
        self,
        *,
        width: int,
        num_outputs: int,
        depth: int,
        heads: int,
        dropout: float,
        output_map: bool = False,
        pooling: Pooling = "transformer",
    ) -> None:
        """
        Args:
            width: D; divisible by ``heads``.
            num_outputs: K.
            pooling: of transformed tokens the mean; or mean or maximum of the tokens as they are, without blocks.
        """
        super().__init__()
        self._pooling = pooling
        depth = depth if pooling == "transformer" else 0
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, dropout=dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_outputs))
        self.output_map = nn.Linear(width, width) if output_map else None
        if self.output_map is not None:
            nn.init.eye_(self.output_map.weight)
            nn.init.zeros_(self.output_map.bias)

    def pooled(self, tokens: Tensor) -> Tensor:
        """The mean of the transformed tokens (or as ``pooling`` says), ``[B, D]``. Any number of tokens will do."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.amax(dim=1) if self._pooling == "max" else tokens.mean(dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """The target feature ``[B, D]``."""
        pooled = self.pooled(tokens)
        return pooled if self.output_map is None else self.output_map(pooled)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        logits: Tensor = self.head(self.pooled(tokens))
        return logits

    def attention(self, tokens: Tensor) -> Tensor:
        """The attention weights of every block, ``[depth, B, heads, N, N]``: of each token (second last), to each (last)."""
        weights = []
        for block in self.blocks:
            assert isinstance(block, Block)
            weights.append(block.weights(tokens))
            tokens = block(tokens)
        return torch.stack(weights)

    @torch.no_grad()
    def fit_output_map(self, pooled: Tensor, features: Tensor) -> None:
        """Set the output map to the least-squares fit of ``features`` ``[n, D]`` by ``pooled`` ``[n, D]``, in float64.

        Raises:
            ValueError: the aggregator was built without an output map.
        """
        if self.output_map is None:
            raise ValueError("this aggregator has no output map to fit")
        ones = torch.ones(len(pooled), 1, dtype=torch.float64)
        x = torch.cat([pooled.double().cpu(), ones], dim=1)
        solution = torch.linalg.lstsq(x, features.double().cpu(), driver="gelsd").solution
        self.output_map.weight.copy_(solution[:-1].T)
        self.output_map.bias.copy_(solution[-1])
