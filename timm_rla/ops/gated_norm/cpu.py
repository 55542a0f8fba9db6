"""The memory passes over a feature map on a CPU, by torch's own kernels of batch norm.

A feature map is viewed as one image with B * C channels, [1, B * C, H, W]: batch norm then has statistics, scale and
shift for each image and channel. Its kernels are vectorised and make one pass where general operators make two or more.
"""
from typing import Tuple

import torch

__all__ = ['apply', 'available', 'combine', 'reduce', 'statistics']

aten = torch.ops.aten


def available(z: torch.Tensor) -> bool:
    """True if these passes take a feature map: float32 or float64 on a CPU, contiguous, not empty."""
    return (
        z.device.type == 'cpu'
        and z.dtype in (torch.float32, torch.float64)
        and z.is_contiguous()
        and z.numel() > 0
    )


def _rows(z: torch.Tensor) -> torch.Tensor:
    return z.reshape(1, -1, *z.shape[2:])


def _affine(z: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(z - mean) * scale + shift"""
    mean, scale, shift = mean.flatten(), scale.flatten(), shift.flatten()
    ones = torch.ones_like(mean)
    out, _, _ = torch.native_batch_norm(_rows(z), scale, shift, mean, ones, False, 0., 0.)
    return out.resize_(z.shape)  # no view: autograd lets nobody change one that an autograd function returns


def statistics(z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over H and W: [B, C, H, W] -> [B, C] each.

    By group norm with one group per channel, whose sums are vectorised and stable. Its output is thrown away, which
    costs less than `batch_norm_update_stats`, whose scalar sums in double precision take three times as long.
    """
    batch, channels, height, width = z.shape
    tiny = torch.finfo(z.dtype).tiny  # keeps the reciprocal of the standard deviation finite
    _, mean, rstd = torch.native_group_norm(z, None, None, batch, channels, height * width, channels, tiny)
    return mean, rstd.square().reciprocal() - tiny


def apply(
        z: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        shortcut: torch.Tensor,
) -> torch.Tensor:
    """relu((z - mean) * scale + shift + shortcut), with mean, scale and shift [B, C]."""
    return _affine(z, mean, scale, shift).add_(shortcut).relu_()


def reduce(
        grad: torch.Tensor,
        out: torch.Tensor,
        z: torch.Tensor,
        mean: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient g behind the ReLU [B, C, H, W], and over H and W the sums of g and of g * (z - mean), [B, C] each."""
    g = aten.threshold_backward(grad, out, 0).contiguous()
    mean = mean.flatten()
    _, sum_gz, sum_g = aten.native_batch_norm_backward(
        _rows(g), _rows(z), None, mean, torch.ones_like(mean), None, None, False, 0., [False, True, True])
    return g, sum_g.view(z.shape[:2]), sum_gz.view(z.shape[:2])


def combine(
        g: torch.Tensor,
        z: torch.Tensor,
        mean: torch.Tensor,
        k1: torch.Tensor,
        k2: torch.Tensor,
        k3: torch.Tensor,
) -> torch.Tensor:
    """g * k1 + (z - mean) * k2 + k3, with all k [B, C]."""
    return _affine(z, mean, k2, k3).addcmul_(g, k1[:, :, None, None])
