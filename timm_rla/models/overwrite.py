"""In eager evaluation volumes that nobody needs any more are written over, where the plain network takes new memory.

On a CPU it costs more to get the memory of a volume from the system, page by page, than to compute what goes there.
"""
from typing import Optional

import torch
import torch.nn as nn

from .._torch import in_plain_eager_mode, is_hooked

__all__ = ['downsample_over', 'may_overwrite', 'norm_over']


def may_overwrite(x: torch.Tensor, conv: nn.Module, *behind: Optional[nn.Module]) -> bool:
    """Whether a volume may be: no backward pass will need it, and nobody looks at it.

    Args:
        x: Output of a convolution, or of what follows it.
        conv: The convolution.
        behind: Modules behind it that the volume has gone through, or will.
    """
    return (
        not torch.is_grad_enabled()
        and in_plain_eager_mode(x)
        and type(conv) is nn.Conv2d  # which returns new memory
        and not any(is_hooked(module) for module in (conv, *behind) if module is not None)
    )


def norm_over(x: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
    """A norm of the output x of a convolution, written over it if that may be; the same bit for bit.

    Args:
        x: [B, C, H, W].
        conv: The convolution.
        norm: The norm that follows it.
    """
    if (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.running_mean is not None
        and may_overwrite(x, conv, norm)
        and x.device.type == 'cpu'
    ):
        none = norm.running_mean.new_empty(0)  # for what training would save
        torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0., norm.eps, out=(x, none, none))
        return x
    return norm(x)


def downsample_over(downsample: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a downsampling layer returns, whose last two parts are a convolution and a norm if it is timm's.

    Args:
        downsample: The layer.
        x: Its input [B, C_in, H, W].
    """
    if type(downsample) is not nn.Sequential or len(downsample) < 2 or is_hooked(downsample):
        return downsample(x)
    *front, conv, norm = downsample
    for module in front:
        x = module(x)
    return norm_over(conv(x), conv, norm)
