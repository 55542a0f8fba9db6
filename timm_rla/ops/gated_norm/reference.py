"""The gated norm step by step: what the fused form must equal."""
import torch
import torch.nn.functional as F

__all__ = ['GatedNormReference']


class GatedNormReference:
    """The output A_l of a batch norm in training, with the three methods of `GatedNorm`.

    Args:
        z: Input of the norm [B, C, H, W].
        weight: gamma [C].
        bias: beta [C].
        eps: Added to the variance.
    """

    def __init__(self, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
        self.features = F.batch_norm(z, None, None, weight, bias, training=True, eps=eps)

    def mean_pooled(self) -> torch.Tensor:
        """-> [B, C]"""
        return self.features.mean((2, 3))

    def max_pooled(self) -> torch.Tensor:
        """-> [B, C]"""
        return self.features.amax((2, 3))

    def gate_and_add(self, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """[B, 1] or [B, C]; [B, C, H, W] -> relu(gate * A_l + shortcut) [B, C, H, W]"""
        return F.relu(gate[:, :, None, None] * self.features + shortcut)
