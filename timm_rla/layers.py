"""The layers of Recurrent Layer Attention: tensors and explicit state in, tensors and state out.

Nothing here knows a model. Equations are those of the paper (docs/paper.md). Symbols, in code and documentation alike:
B batch, C channels, H height, W width, N context length, M hidden units, r reduction.
"""
from numbers import Integral
from typing import Dict, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

__all__ = ['CONTEXTS', 'Context', 'LayerAttention', 'pool', 'resample_context']


class ContextSpec(NamedTuple):
    """How a feature map is summarised (section 3.2): by which pooling, and whether two linear layers follow."""
    max_pool: bool
    mlp: bool


CONTEXTS: Dict[str, ContextSpec] = {
    'gap': ContextSpec(max_pool=False, mlp=False),
    'gmp': ContextSpec(max_pool=True, mlp=False),
    'gap_mlp': ContextSpec(max_pool=False, mlp=True),
    'gmp_mlp': ContextSpec(max_pool=True, mlp=True),
}
CONTEXT_MLP_REDUCTION = 16  # the C/16 of the SE module, which the paper's "GAP+MLP" takes over


def _is_count(value: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def resample_context(x: torch.Tensor, channels: int, context_dim: int) -> torch.Tensor:
    """Resample pooled features [B, C] to [B, N] without parameters: group mean if C > N, nearest repeat if C < N.

    Equal to adaptive average pooling for every C and N. The two usual cases, where one divides the other, are spelled
    out since their gradients are deterministic on GPUs. C is an argument since tracing knows no shapes.
    """
    if channels == context_dim:
        return x
    if channels % context_dim == 0:
        return x.unflatten(1, (context_dim, channels // context_dim)).mean(2)
    if context_dim % channels == 0:
        return x.unsqueeze(2).expand(-1, -1, context_dim // channels).flatten(1)
    return F.adaptive_avg_pool1d(x, context_dim)


def pool(x: torch.Tensor, max_pool: bool) -> torch.Tensor:
    """Global max or average pooling: [B, C, H, W] -> [B, C]"""
    pooled = x.amax((2, 3), keepdim=True) if max_pool else x.mean((2, 3), keepdim=True)
    return pooled.flatten(1)  # in two steps, as timm pools: kernels for channels_last want four dimensions


class Context(nn.Module):
    """Summary S_l of a feature map (eq. 2), from its pooled features: `context(context.pool(x))`.

    Args:
        channels: C.
        context_dim: N.
        context: A key of `CONTEXTS`.

    Raises:
        ValueError: `context` is not a key of `CONTEXTS`, or `context_dim` no whole number of at least 1.
    """

    def __init__(self, channels: int, context_dim: int, context: str = 'gap', device=None, dtype=None):
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(f'context must be one of {", ".join(CONTEXTS)}, not {context!r}')
        if not _is_count(context_dim):
            raise ValueError(f'context_dim must be a whole number, at least 1, not {context_dim!r}')
        spec = CONTEXTS[context]
        self.channels = channels
        self.context_dim = context_dim
        self.max_pool = spec.max_pool
        self.before_last_conv = False  # as FoldedContext, which may pool what the last convolution is given
        self.mlp = Mlp(
            channels,
            max(1, channels // CONTEXT_MLP_REDUCTION),
            act_layer=nn.ReLU,
            device=device,
            dtype=dtype,
        ) if spec.mlp else None

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C]"""
        return pool(x, self.max_pool)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """[B, C] -> [B, N]"""
        if self.mlp is not None:
            pooled = self.mlp(pooled)
        return resample_context(pooled, self.channels, self.context_dim)


class LayerAttention(nn.Module):
    """Head of one block that infers its layer attention from the hidden state (eq. 4): [B, M] -> [B, out_dim].

    Args:
        hidden_dim: M.
        reduction: r, a divisor of M; the first layer has M / r outputs.
        out_dim: 1 for a scalar attention, C for one value per channel (RLA-vector).

    Raises:
        ValueError: `hidden_dim` or `reduction` is no whole number of at least 1, or the latter no divisor.
    """

    def __init__(self, hidden_dim: int, reduction: int, out_dim: int = 1, device=None, dtype=None):
        super().__init__()
        if not _is_count(hidden_dim):
            raise ValueError(f'hidden_dim must be a whole number, at least 1, not {hidden_dim!r}')
        if not _is_count(reduction) or hidden_dim % reduction:
            raise ValueError(f'reduction must be a divisor of hidden_dim = {hidden_dim}, not {reduction!r}')
        self.fc1 = nn.Linear(hidden_dim, hidden_dim // reduction, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim // reduction, out_dim, device=device, dtype=dtype)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h_l [B, M] -> a_l [B, out_dim], in (0, 1)"""
        return self.fc2(self.fc1(h).relu()).sigmoid()
