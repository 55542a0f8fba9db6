"""Batch norm, gate, shortcut and ReLU in as many memory passes as without the gate.

In training, the last batch norm of a block turns z, the output of the last convolution, into A_l. Let m and v be mean
and variance of z over H and W, [B, C], and gamma, beta, mu, rstd those of the batch norm. Then

    mu = mean(m), var = mean(v) + var(m)            over the batch (law of total variance)
    p = (m - mu) gamma rstd + beta                  global average pooling of A_l: what context and SE look at
    A_l = (z - m) gamma rstd + p
    relu(a A_l + shortcut) = relu((z - m) (a gamma rstd) + a p + shortcut)

One reduction serves batch norm and context, and A_l is never written. Backward, one reduction gives the sums of g and
of g (z - m), which are all that the [B, C] tensors in between need, and one more pass gives the gradient of z.

Compiled, these formulas are enough: the compiler makes the passes. In eager mode the passes come from cpu.py or
triton.py, and two autograd functions share them.
"""
import os
from types import ModuleType
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from ..._torch import in_plain_eager_mode, needs_operators
from ..differentiate import differentiate
from . import cpu

__all__ = ['GatedNorm', 'form', 'gated_norm', 'set_form']

FORMS = ('off', 'on', 'triton')
_form = 'on'


def set_form(name: str) -> None:
    """Choose the form of the gated norm.

    Args:
        name: 'on' for the fused form where there is one, 'off' for the modules everywhere, 'triton' for 'on' and, in
            eager mode on a GPU, the Triton kernels.

    Raises:
        ValueError: Another name.
    """
    global _form
    if name not in FORMS:
        raise ValueError(f'TIMM_RLA_FUSED must be one of {", ".join(FORMS)}, not {name!r}')
    _form = name


def form() -> str:
    """The form chosen: by `set_form`, else by the environment variable TIMM_RLA_FUSED, else 'on'."""
    return _form


set_form(os.environ.get('TIMM_RLA_FUSED', _form))


def _eager_passes(z: torch.Tensor) -> Optional[ModuleType]:
    """Module with the memory passes for a feature map in ordinary eager execution, None if there is none."""
    if not in_plain_eager_mode(z):
        return None
    if cpu.available(z):
        return cpu
    if _form == 'triton' and z.device.type == 'cuda':
        from . import triton  # takes a second, and needs a GPU
        return triton if triton.available(z) else None
    return None


class _Shared:
    """What the two autograd functions of one block share."""

    def __init__(self, passes: ModuleType):
        self.passes = passes
        self.scale: Optional[torch.Tensor] = None  # a gamma rstd [B, C], set by `_GateAndAdd`


def _expand(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None]


class _Statistics(NamedTuple):
    """Of batch norm, from the mean of each image."""
    mean: torch.Tensor  # mu [C]
    var: torch.Tensor  # [C]
    centred: torch.Tensor  # m - mu [B, C]
    rstd: torch.Tensor  # [C]
    scale: torch.Tensor  # gamma rstd [C]
    pooled: torch.Tensor  # p [B, C]


def _batch_statistics(
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
) -> _Statistics:
    batch_mean = mean.mean(0)
    centred = mean - batch_mean
    batch_var = var.mean(0) + centred.square().mean(0)
    rstd = (batch_var + eps).rsqrt()
    scale = weight * rstd
    return _Statistics(batch_mean, batch_var, centred, rstd, scale, centred * scale + bias)


def _normalize(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Tuple[torch.Tensor, ...]:
    """z, m, gamma rstd and p; mean and variance of the batch."""
    precise = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    var, mean = torch.var_mean(precise, (2, 3), correction=0)
    norm = _batch_statistics(mean, var, weight, bias, eps)
    return z, mean, norm.scale, norm.pooled, norm.mean, norm.var


def _gated(
        z: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        pooled: torch.Tensor,
        gate: torch.Tensor,
) -> torch.Tensor:
    """a A_l"""
    return (z - _expand(mean)) * _expand(gate * scale) + _expand(gate * pooled)


class _Normalize(torch.autograd.Function):
    """`_normalize` by passes.

    The contract with `_GateAndAdd`: it returns g, the gradient behind the ReLU, as the gradient of this function's
    first output, and leaves the multiplication by a gamma rstd (`shared.scale`) to the one pass that is made here.
    """

    @staticmethod
    def forward(ctx, z, weight, bias, eps, shared):
        mean, var = shared.passes.statistics(z)
        norm = _batch_statistics(mean, var, weight, bias, eps)
        ctx.shared, ctx.eps = shared, eps
        ctx.save_for_backward(z, weight, mean, norm.mean, norm.rstd, norm.scale)
        ctx.mark_non_differentiable(norm.mean, norm.var)
        return z, mean, norm.scale, norm.pooled, norm.mean, norm.var

    @staticmethod
    def backward(ctx, g, grad_mean, grad_scale, grad_pooled, *_):
        z, weight, mean, batch_mean, rstd, scale = ctx.saved_tensors
        grads = g, grad_mean, grad_scale, grad_pooled
        if needs_operators(*grads):
            bias = torch.zeros_like(weight).requires_grad_(ctx.needs_input_grad[2])  # no gradient depends on its value
            return *differentiate(lambda *inputs: _normalize(*inputs, ctx.eps), (z, weight, bias), grads), None, None
        batch, _, height, width = z.shape
        size = height * width
        centred = mean - batch_mean
        grad_bias = grad_pooled.sum(0)
        grad_weight = (grad_scale + (grad_pooled * centred).sum(0)) * rstd
        grad_var = -0.5 * grad_weight * scale * rstd
        grad_m = torch.addcmul(grad_mean, grad_pooled - grad_bias / batch, scale)
        grad_m = torch.addcmul(grad_m, centred, grad_var, value=2 / batch)
        factor = torch.zeros_like(mean) if ctx.shared.scale is None else ctx.shared.scale  # None: only pooled was used
        grad_var = (grad_var * (2 / (batch * size))).expand_as(mean)
        grad_z = ctx.shared.passes.combine(g, z, mean, factor, grad_var, grad_m / size)
        return grad_z, grad_weight, grad_bias, None, None


class _GateAndAdd(torch.autograd.Function):
    """relu(a A_l + shortcut) by passes; see `_Normalize` for the gradient that it returns for `alias`."""

    @staticmethod
    def forward(ctx, alias, z, mean, scale, pooled, gate, shortcut, shared):
        factor = gate * scale
        out = shared.passes.apply(z, mean, factor, gate * pooled, shortcut)
        ctx.shared = shared
        shared.scale = factor
        ctx.save_for_backward(out, z, mean, scale, pooled, gate)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, *inputs = ctx.saved_tensors
        if needs_operators(grad):
            g = torch.ops.aten.threshold_backward(grad, out, 0)
            grad_z, *grads = differentiate(lambda *inputs: [_gated(*inputs)], inputs, [g])
            return grad_z, None, *grads, g, None  # by operators `_Normalize` does not multiply
        z, mean, scale, pooled, gate = inputs
        g, sum_g, sum_gz = ctx.shared.passes.reduce(grad, out, z, mean)
        grad_pooled = sum_g * gate
        grad_gate = torch.addcmul(sum_gz * scale, sum_g, pooled)
        if gate.shape[1] == 1:
            grad_gate = grad_gate.sum(1, keepdim=True)
        return g, None, -scale * grad_pooled, (sum_gz * gate).sum(0), grad_pooled, grad_gate, g, None


class GatedNorm(NamedTuple):
    """The output A_l of a batch norm, as what it is made of: A_l = (z - mean) * scale + pooled."""
    z: torch.Tensor  # [B, C, H, W]
    mean: torch.Tensor  # m [B, C]
    scale: torch.Tensor  # gamma rstd [C]
    pooled: torch.Tensor  # p [B, C]
    alias: torch.Tensor  # z as returned by `_Normalize`; the only path for its gradient
    shared: Optional[_Shared]  # None when compiled

    def mean_pooled(self) -> torch.Tensor:
        """Global average pooling of A_l [B, C]."""
        return self.pooled.to(self.z.dtype)

    def max_pooled(self) -> torch.Tensor:
        """Global max pooling of A_l [B, C]: where its slope is negative the minimum of z, where it is 0 anything."""
        low, high = self.z.amin((2, 3)), self.z.amax((2, 3))
        # For a slope of 0 all values tie, and the gradient of max pooling is spread evenly as that of the mean
        extreme = torch.where(self.scale > 0, high, torch.where(self.scale < 0, low, self.mean))
        return ((extreme - self.mean) * self.scale + self.pooled).to(self.z.dtype)

    def gate_and_add(self, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """[B, 1] or [B, C]; [B, C, H, W] -> relu(gate * A_l + shortcut) [B, C, H, W]"""
        parts = self.z, self.mean, self.scale, self.pooled, gate
        if self.shared is not None:
            return _GateAndAdd.apply(self.alias, *parts, shortcut, self.shared)
        return (_gated(*parts) + shortcut).to(self.z.dtype).relu()


def _update_running_stats(norm: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor) -> None:
    """As batch norm does: exponential, or with momentum None cumulative, average of mean and variance [C]."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if momentum is not None and norm.running_mean is not None:
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


def gated_norm(z: torch.Tensor, norm: nn.BatchNorm2d) -> Optional[GatedNorm]:
    """Fused form of a batch norm that normalises by the statistics of the batch; updates the running statistics.

    Args:
        z: Input of the norm [B, C, H, W].
        norm: Vanilla (`is_vanilla`), with weight and bias, in training mode or without running statistics.

    Returns:
        None where there is no fused form: switched off, not compiled and not in ordinary eager execution, no passes
        for the device, type or layout, or less than two values for each channel.
    """
    if _form == 'off':
        return None
    shared = None
    if not torch.compiler.is_compiling():
        passes = _eager_passes(z)
        if passes is None:
            return None
        shared = _Shared(passes)
    count = z.shape[0] * z.shape[2] * z.shape[3]
    if count < 2:
        return None
    inputs = z, norm.weight, norm.bias, norm.eps
    alias, mean, scale, pooled, batch_mean, batch_var = (
        _normalize(*inputs) if shared is None else _Normalize.apply(*inputs, shared))
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            _update_running_stats(norm, batch_mean, batch_var * (count / (count - 1)))
    return GatedNorm(z, mean, scale, pooled, alias, shared)
