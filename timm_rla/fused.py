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
running mean in place of m and beta in place of p, if that pass is a single one: by the Triton kernels.

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
from .autograd import differentiate
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
        self.scale: Optional[torch.Tensor] = None  # a gamma rstd [B, C]


def _link(z: torch.Tensor) -> Optional[_Link]:
    passes = _passes(z) if in_plain_eager_mode(z) else None
    return None if passes is None else _Link(passes)


def _over_image(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None]


class _BatchNorm(NamedTuple):
    """Batch norm as the statistics of each image make it."""
    mean: torch.Tensor  # mu [C]
    var: torch.Tensor  # [C]
    centred: torch.Tensor  # m - mu [B, C]
    rstd: torch.Tensor  # [C]
    scale: torch.Tensor  # gamma rstd [C]
    pooled: torch.Tensor  # p [B, C]


def _batch_norm(
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
) -> _BatchNorm:
    batch_mean = mean.mean(0)
    centred = mean - batch_mean
    batch_var = var.mean(0) + centred.square().mean(0)
    rstd = (batch_var + eps).rsqrt()
    scale = weight * rstd
    return _BatchNorm(batch_mean, batch_var, centred, rstd, scale, centred * scale + bias)


def _normalize(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Tuple[torch.Tensor, ...]:
    """z, m, gamma rstd and p; mean and variance of the batch."""
    volume = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    var, mean = torch.var_mean(volume, (2, 3), correction=0)
    norm = _batch_norm(mean, var, weight, bias, eps)
    return z, mean, norm.scale, norm.pooled, norm.mean, norm.var


def _gate(
        z: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        gate: torch.Tensor,
) -> torch.Tensor:
    """a A_l"""
    return (z - _over_image(mean)) * _over_image(gate * scale) + _over_image(gate * offset)


class _Normalize(torch.autograd.Function):
    """`_normalize`. The gradient of its first output comes without its factor `link.scale`: multiplying by it is part
    of the one pass that adds up all that makes the gradient of z."""

    @staticmethod
    def forward(ctx, z, weight, bias, eps, link):
        mean, var = link.passes.statistics(z)
        norm = _batch_norm(mean, var, weight, bias, eps)
        ctx.link, ctx.eps = link, eps
        ctx.save_for_backward(z, weight, bias, mean, norm.mean, norm.rstd, norm.scale)
        ctx.mark_non_differentiable(norm.mean, norm.var)
        return z, mean, norm.scale, norm.pooled, norm.mean, norm.var

    @staticmethod
    def backward(ctx, g, grad_mean, grad_scale, grad_pooled, *_):
        z, weight, bias, mean, batch_mean, rstd, scale = ctx.saved_tensors
        grads = g, grad_mean, grad_scale, grad_pooled
        if needs_operators(*grads):
            return *differentiate(lambda *inputs: _normalize(*inputs, ctx.eps), (z, weight, bias), grads), None, None
        batch, _, height, width = z.shape
        size = height * width
        centred = mean - batch_mean
        grad_bias = grad_pooled.sum(0)
        grad_weight = (grad_scale + (grad_pooled * centred).sum(0)) * rstd
        grad_var = -0.5 * grad_weight * scale * rstd
        grad_m = torch.addcmul(grad_mean, grad_pooled - grad_bias / batch, scale)
        grad_m = torch.addcmul(grad_m, centred, grad_var, value=2 / batch)
        factor = torch.zeros_like(mean) if ctx.link.scale is None else ctx.link.scale  # None: nothing came behind
        grad_var = (grad_var * (2 / (batch * size))).expand_as(mean)
        return ctx.link.passes.combine(g, z, mean, factor, grad_var, grad_m / size), grad_weight, grad_bias, None, None


class _GateAndAdd(torch.autograd.Function):
    """relu(a A_l + shortcut). The gradient of z goes to the first output of `_Normalize`, `alias`, which goes nowhere
    else."""

    @staticmethod
    def forward(ctx, alias, z, mean, scale, offset, gate, shortcut, link):
        factor = gate * scale
        out = link.passes.apply(z, mean, factor, gate * offset, shortcut)
        ctx.link = link
        link.scale = factor
        ctx.save_for_backward(out, z, mean, scale, offset, gate)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, *inputs = ctx.saved_tensors
        if needs_operators(grad):
            g = torch.ops.aten.threshold_backward(grad, out, 0)
            grad_z, *grads = differentiate(lambda *inputs: [_gate(*inputs)], inputs, [g])
            return grad_z, None, *grads, g, None
        z, mean, scale, offset, gate = inputs
        g, sum_g, sum_gz = ctx.link.passes.reduce(grad, out, z, mean)
        grad_offset = sum_g * gate
        grad_gate = torch.addcmul(sum_gz * scale, sum_g, offset)
        if gate.shape[1] == 1:
            grad_gate = grad_gate.sum(1, keepdim=True)
        return g, None, -scale * grad_offset, (sum_gz * gate).sum(0), grad_offset, grad_gate, g, None


class FusedNorm(NamedTuple):
    """The output A_l of a batch norm as what it is made of: A_l = (z - mean) * scale + offset."""
    z: torch.Tensor  # [B, C, H, W]
    mean: torch.Tensor  # [B, C]
    scale: torch.Tensor  # [C]
    offset: torch.Tensor  # [B, C] or [C]
    pooled: Optional[torch.Tensor]  # [B, C], global average pooling of A_l, if that is known already
    dtype: torch.dtype  # of the norm's parameters, and so of what is pooled
    alias: torch.Tensor  # z, to which _GateAndAdd gives the gradient of z
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
        parts = self.z, self.mean, self.scale, self.offset, gate
        if self.link is not None:
            return _GateAndAdd.apply(self.alias, *parts, shortcut, self.link)
        return (_gate(*parts) + shortcut).to(self.z.dtype).relu()


def _update_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor) -> None:
    """As batch norm does: exponential, or with momentum None cumulative, average of mean and variance [C]."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if momentum is None:
        momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


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
    inputs = z, norm.weight, norm.bias, norm.eps
    alias, mean, scale, pooled, batch_mean, batch_var = (
        _normalize(*inputs) if link is None else _Normalize.apply(*inputs, link))
    if norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            _update_running_stats(norm, batch_mean, batch_var * (count / (count - 1)))
    return FusedNorm(z, mean, scale, pooled, pooled, norm.weight.dtype, alias, link)


def fused_eval_norm(z: torch.Tensor, norm: nn.Module, pooled: Optional[torch.Tensor]) -> Optional[FusedNorm]:
    """Batch norm of a volume in evaluation, in eager mode and without gradients, not carried out but taken apart.

    Args:
        z: Input of the batch norm [B, C, H, W].
        norm: The norm layer.
        pooled: Its output after global average pooling [B, C], if that is known already.

    Returns:
        None where there is no fused form, as for `fused_norm`, and when compiled or with gradients, or where the last
        pass is several as it is without.
    """
    if not _is_plain(norm) or norm.training or norm.running_mean is None:
        return None
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    link = _link(z)
    if link is None or link.passes is cpu:
        return None
    # What batch norm makes of ones is its scale, rounded as it does: a warm start returns the same logits bit for bit
    ones, zeros = torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean)
    scale = F.batch_norm(ones[None], zeros, norm.running_var, norm.weight, eps=norm.eps).squeeze(0)
    mean = norm.running_mean.expand(z.shape[:2])
    return FusedNorm(z, mean, scale, norm.bias, pooled, norm.weight.dtype, z, link)
