"""The N frozen experts as one module, and the mask that keeps an image's own expert out.

Notation: B images, N experts, D feature width; tokens ``[B, N, D]``.
"""

from collections.abc import Iterable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from dmoe.models.copying import private_copy
from dmoe.precision import Precision, computing_in, not_coarse

Mask = Literal["remove", "zero", "none"]
BatchNormStatistics = Literal["running", "batch"]


class ExpertPool(nn.Module):
    """Experts' features of each image, side by side: ``[B, C, H, W] -> [B, N, D]``, without gradient.

    With ``batch_norm="running"`` the experts normalise by what they saw in training. With ``"batch"`` they normalise by the
    batch at hand, as the public code's ``--test`` entry does by leaving them in training mode; nothing is remembered from
    one batch to the next. The modules that are handed in stay as they are.
    """

    def __init__(
        self, experts: Iterable[nn.Module], *, batch_norm: BatchNormStatistics = "running", precision: Precision = "float32"
    ) -> None:
        """
        Args:
            experts: at least one feature extractor, ``[B, C, H, W] -> [B, D]``, all of one width.
        """
        super().__init__()
        self.experts = nn.ModuleList(private_copy(expert) for expert in experts)
        if not self.experts:
            raise ValueError("an expert pool needs at least one expert")
        self.batch_norm, self._precision = batch_norm, precision
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Experts are frozen: whatever ``mode``, dropout is off, and batch-norm goes by what was asked for."""
        super().train(False)
        if self.batch_norm == "batch":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = True
                    module.track_running_stats = False
        return self

    def __len__(self) -> int:
        return len(self.experts)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with computing_in(self._precision, images.device):
            tokens = torch.stack([expert(images) for expert in self.experts], dim=1)
        return not_coarse(tokens)


def without_own_expert(tokens: Tensor, own: Tensor, *, mask: Mask = "remove") -> Tensor:
    """Take from each image the token of the expert that was trained on its domain.

    Args:
        tokens: ``[B, N, D]``.
        own: ``[B]`` int64, the number of that expert.
        mask: ``remove`` leaves N - 1 tokens in their order (the public code); ``zero`` multiplies the token by 0 (the
            paper's text); ``none`` changes nothing (the paper's ablation).

    Returns:
        ``[B, N - 1, D]`` for ``remove``, else ``[B, N, D]``.
    """
    if mask == "none":
        return tokens
    count, experts, width = tokens.shape
    others = torch.arange(experts, device=tokens.device).expand(count, -1) != own.unsqueeze(1)  # [B, N]
    if mask == "zero":
        return tokens * others.unsqueeze(2)
    return tokens[others].view(count, experts - 1, width)
