"""Batch norm, layer attention, shortcut and ReLU in the memory passes that these need without layer attention, too.

In training, the last batch norm of a block turns z, the output of the last convolution, into A_l. Let m and v be mean
and variance of z over H and W, [B, C], and gamma, beta, mu, rstd those of the batch norm. Then

    mu = mean(m), var = mean(v) + var(m)            over the batch (law of total variance)
    p = (m - mu) gamma rstd + beta                  global average pooling of A_l: what context and SE look at
    A_l = (z - m) gamma rstd + p
    relu(a A_l + shortcut) = relu((z - m) (a gamma rstd) + a p + shortcut)

One reduction serves both batch norm and context, and A_l is never written. Backward, one reduction gives the sums of
g and of g (z - m), which are all that the [B, C] tensors in between want, and one more pass the gradient of z.

In evaluation, where nothing is recorded for a backward pass, batch norm is a part of the last pass as well, with its
running mean in place of m and beta in place of p.

When compiled, these formulas are enough, since the compiler makes the passes of them. In eager mode the passes come
from a module of `timm_rla.kernels`, and two autograd functions hand each other what they need for them.
"""
import os
from types import ModuleType
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._torch import in_plain_eager_mode, needs_operators
from .kernels import cpu

__all__ = ['FusedNorm', 'fused_eval_norm', 'fused_norm', 'set_fused', 'use_fused']

MODES = ('off', 'on', 'triton')
_mode = 'on'


def set_fused(mode: str) -> None:
    """Choose the form of the blocks.

    Args:
        mode: 'on' for the fused form where there is one, 'off' for the general form everywhere, 'triton' for 'on' and
            the Triton kernels in eager mode on a GPU.

    Raises:
        ValueError: Another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f'fused form must be one of {", ".join(MODES)}, not {mode!r}')
    _mode = mode


def use_fused() -> str:
    """The form chosen: by `set_fused`, else by the environment variable TIMM_RLA_FUSED, else 'on'."""
    return _mode


set_fused(os.environ.get('TIMM_RLA_FUSED', _mode))


def _passes(z: torch.Tensor) -> Optional[ModuleType]:
    """The module with the passes for a volume in eager mode; None if none takes it."""
    if cpu.available(z):
        return cpu
    if _mode == 'triton' and z.device.type == 'cuda':
        from .kernels import triton
        return triton if triton.available(z) else None
    return None


def _is_plain(norm: nn.Module) -> bool:
    return _mode != 'off' and type(norm) is nn.BatchNorm2d and norm.weight is not None and norm.bias is not None


class _Link:
    """What the two functions of one block share: the passes, and the gate's scale, which comes after the statistics."""

    def __init__(self, passes: ModuleType):
        self.passes = passes
        self.scale: Optional[torch.Tensor] = None  # [B, C]


def _link(z: torch.Tensor) -> Optional[_Link]:
    passes = _passes(z) if in_plain_eager_mode(z) else None
    return None if passes is None else _Link(passes)


def _over_image(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None]


class _Statistics(torch.autograd.Function):
    """z -> z, mean and variance over H and W. The gradient of its first output comes without its factor `link.scale`:
    multiplying by it is part of the one pass that adds up all that makes the gradient of z."""

    @staticmethod
    def forward(ctx, z, link):
        mean, var = link.passes.statistics(z)
        ctx.link = link
        ctx.save_for_backward(z, mean)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx, g, grad_mean, grad_var):
        z, mean = ctx.saved_tensors
        size = z.shape[2] * z.shape[3]
        k2 = torch.zeros_like(mean) if grad_var is None else grad_var * (2 / size)
        k3 = torch.zeros_like(mean) if grad_mean is None else grad_mean / size
        if needs_operators(g, grad_mean, grad_var):
            grad = (z - _over_image(mean)) * _over_image(k2) + _over_image(k3)
            return (grad if g is None else grad + g), None
        if g is None:
            g, scale = torch.zeros_like(z), torch.zeros_like(mean)
        else:
            scale = ctx.link.scale
        return ctx.link.passes.combine(g, z, mean, scale, k2, k3), None


class _Apply(torch.autograd.Function):
    """relu((z - mean) * scale + shift + shortcut). The gradient of z goes to the first output of _Statistics, `alias`,
    which goes nowhere else."""

    @staticmethod
    def forward(ctx, alias, z, mean, scale, shift, shortcut, link):
        out = link.passes.apply(z, mean, scale, shift, shortcut)
        link.scale = scale.detach()  # its own graph leads back to the link: a circle that nobody would free
        ctx.link = link
        ctx.save_for_backward(out, z, mean, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, z, mean, scale = ctx.saved_tensors
        if needs_operators(grad):
            g = torch.ops.aten.threshold_backward(grad, out, 0)
            grad_scale, grad_shift = (g * (z - _over_image(mean))).sum((2, 3)), g.sum((2, 3))
            return g * _over_image(scale), None, -scale * grad_shift, grad_scale, grad_shift, g, None
        g, sum_g, sum_gz = ctx.link.passes.reduce(grad, out, z, mean)
        return g, None, -scale * sum_g, sum_gz, sum_g, g, None


class FusedNorm(NamedTuple):
    """The output A_l of a batch norm as what it is made of: A_l = (z - mean) * scale + offset."""
    z: torch.Tensor  # [B, C, H, W]
    mean: torch.Tensor  # [B, C]
    scale: torch.Tensor  # [C]
    offset: torch.Tensor  # [B, C] or [C]
    pooled: Optional[torch.Tensor]  # [B, C], global average pooling of A_l, if that is known already
    dtype: torch.dtype  # of the norm's parameters, and so of what is pooled
    alias: torch.Tensor  # z, to which _Apply gives the gradient of z
    link: Optional[_Link]  # None when compiled

    def mean_pooled(self) -> torch.Tensor:
        """Global average pooling of A_l [B, C]."""
        pooled = self.pooled
        if pooled is None:
            pooled = (self.z.mean((2, 3)) - self.mean) * self.scale + self.offset
        return pooled.to(self.dtype)

    def max_pooled(self) -> torch.Tensor:
        """Global max pooling of A_l [B, C]: where its slope is negative the minimum of z, where it is 0 anything."""
        low, high = self.z.amin((2, 3)), self.z.amax((2, 3))
        # For a slope of 0 all values tie, and the gradient of max pooling is spread evenly as that of the mean
        extreme = torch.where(self.scale > 0, high, torch.where(self.scale < 0, low, self.mean))
        return ((extreme - self.mean) * self.scale + self.offset).to(self.dtype)

    def gate_and_add(self, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """relu(gate * A_l + shortcut), with the gate [B, 1] or [B, C] and the shortcut [B, C, H, W]."""
        scale, shift = gate * self.scale, gate * self.offset
        if self.link is not None:
            return _Apply.apply(self.alias, self.z, self.mean, scale, shift, shortcut, self.link)
        out = (self.z - _over_image(self.mean)) * _over_image(scale) + _over_image(shift) + shortcut
        return out.to(self.z.dtype).relu()


def _update_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor) -> None:
    """As batch norm does: exponential, or with momentum None cumulative, average of mean and variance [C]."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


def _statistics(z: torch.Tensor, link: Optional[_Link]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if link is not None:
        return _Statistics.apply(z, link)
    volume = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    var, mean = torch.var_mean(volume, (2, 3), correction=0)
    return z, mean, var


def fused_norm(z: torch.Tensor, norm: nn.Module) -> Optional[FusedNorm]:
    """Batch norm of a volume in training, not carried out but taken apart; updates the running statistics.

    Args:
        z: Input of the batch norm [B, C, H, W].
        norm: The norm layer.

    Returns:
        None where there is no fused form: another norm than a plain BatchNorm2d, one that does not use the statistics
        of the batch, or a volume that no passes take.

    Raises:
        ValueError: Not more than one value for each channel.
    """
    if not _is_plain(norm) or not (norm.training or norm.running_mean is None):
        return None
    link = None
    if not torch.compiler.is_compiling():
        link = _link(z)
        if link is None:
            return None

    count = z.shape[0] * z.shape[2] * z.shape[3]
    if count == 0:
        return None
    if count == 1:
        raise ValueError(f'Expected more than 1 value per channel when training, got input size {z.shape}')
    alias, mean, var = _statistics(z, link)  # [B, C]
    batch_mean = mean.mean(0)
    centred = mean - batch_mean
    batch_var = var.mean(0) + centred.square().mean(0)
    if norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            _update_running_stats(norm, batch_mean, batch_var * (count / (count - 1)))
    scale = norm.weight * (batch_var + norm.eps).rsqrt()
    pooled = centred * scale + norm.bias
    return FusedNorm(z, mean, scale, pooled, pooled, norm.weight.dtype, alias, link)


def fused_eval_norm(z: torch.Tensor, norm: nn.Module, pooled: Optional[torch.Tensor]) -> Optional[FusedNorm]:
    """Batch norm of a volume in evaluation, in eager mode and without gradients, not carried out but taken apart.

    Args:
        z: Input of the batch norm [B, C, H, W].
        norm: The norm layer.
        pooled: Its output after global average pooling [B, C], if that is known already.

    Returns:
        None where there is no fused form, as for `fused_norm`, and when compiled or with gradients.
    """
    if not _is_plain(norm) or norm.training or norm.running_mean is None:
        return None
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    link = _link(z)
    if link is None:
        return None
    # What batch norm makes of ones is its scale, rounded as it does: a warm start returns the same logits bit for bit
    ones, zeros = torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean)
    scale = F.batch_norm(ones[None], zeros, norm.running_var, norm.weight, eps=norm.eps).squeeze(0)
    mean = norm.running_mean.expand(z.shape[:2])
    return FusedNorm(z, mean, scale, norm.bias, pooled, norm.weight.dtype, z, link)
