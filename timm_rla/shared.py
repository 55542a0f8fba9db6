"""Linear maps whose weight all steps of a pass share, with the weight's gradient as one product.

Each of L steps adds G_l^T X_l to the gradient of the weight, where X_l is its input and G_l the gradient of its output:
L products of rank B that each write a matrix as large as the weight, and L - 1 sums of these. One product over the
stacked rows does the same. To bring the rows together, each step holds two tensors of zeros that `share_weight` made
of the weight, in the shapes of its output and of its input, and sends G_l and X_l there as their gradients. The state
of all that is the graph itself: it may be compiled, differentiated twice, or run in parts.
"""
import math
from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F

from ._torch import takes_autograd_functions

__all__ = ['SharedWeight', 'share_weight', 'shared_linear']

PARTS = 4  # of a weight, for as many threads or fewer; 2 to 8 took the same time on two


class SharedWeight(NamedTuple):
    """A shared weight as one step holds it. Each step has its own: the gradients of two would add up."""
    weight: torch.Tensor  # [D_out, D_in]
    outputs: Optional[torch.Tensor] = None  # zeros [B, D_out], whose gradient is G_l; None for a plain linear map
    inputs: Optional[torch.Tensor] = None  # zeros [B, D_in], whose gradient is X_l


def _by_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T: [B, D_in], [D_out, D_in] -> [B, D_out]

    On a CPU part by part of the weight. One product of a matrix and few rows, or a single one, does not keep the
    threads of a BLAS library busy; a batch of products does.
    """
    if x.device.type != 'cpu':
        return x @ weight.t()
    parts = weight.unflatten(0, (math.gcd(weight.shape[0], PARTS), -1))
    return torch.bmm(parts, x.t().expand(len(parts), -1, -1)).reshape(weight.shape[0], x.shape[0]).t()


def _by_transposed_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight: [B, D_out], [D_out, D_in] -> [B, D_in]"""
    if x.device.type != 'cpu':
        return x @ weight
    parts = weight.unflatten(1, (math.gcd(weight.shape[1], PARTS), -1)).transpose(0, 1)
    return torch.bmm(x.expand(len(parts), -1, -1), parts).transpose(0, 1).reshape(x.shape[0], weight.shape[1])


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, steps, batch):
        ctx.set_materialize_grads(False)
        zero = weight.new_zeros(())
        return tuple(zero.expand(batch, size) for _ in range(steps) for size in weight.shape)

    @staticmethod
    def backward(ctx, *grads):
        outputs, inputs = ([grad for grad in grads[i::2] if grad is not None] for i in range(2))
        return torch.cat(outputs).t() @ torch.cat(inputs), None, None


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, outputs, inputs):
        ctx.save_for_backward(x, weight)
        return _by_weight(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (_by_transposed_weight(grad, weight) if ctx.needs_input_grad[0] else None), None, grad, x


def share_weight(weight: torch.Tensor, steps: int, batch: int) -> List[SharedWeight]:
    """The weight of a linear map for `shared_linear` in some steps of one forward pass; under autocast, cast once.

    Args:
        weight: [D_out, D_in].
        steps: How often it will be used; fewer times do no harm.
        batch: B.
    """
    if not (takes_autograd_functions(weight) and torch.is_grad_enabled() and weight.requires_grad):
        return [SharedWeight(weight) for _ in range(steps)]
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    zeros = _Share.apply(weight, steps, batch)
    return [SharedWeight(weight, *pair) for pair in zip(zeros[0::2], zeros[1::2])]


def shared_linear(x: torch.Tensor, shared: SharedWeight) -> torch.Tensor:
    """Linear map without bias: [B, D_in] -> [B, D_out]"""
    weight, outputs, inputs = shared
    if torch.jit.is_scripting():
        return F.linear(x, weight)
    if outputs is not None:
        return _SharedLinear.apply(x.to(weight.dtype), weight, outputs, inputs)
    return _by_weight(x, weight) if takes_autograd_functions(x) else F.linear(x, weight)
