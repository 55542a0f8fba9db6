"""Linear maps whose weight all blocks share, with the weight's gradient as one product.

Each of L steps adds its G_l^T X_l to the gradient of the weight: L products of rank B that each write a matrix as large
as the weight, and L - 1 sums of these. Here the steps only leave X_l and G_l, and sum_l G_l^T X_l is one product over
the stacked rows when the backward pass is through with all of them. In eager mode, that is; otherwise a plain
linear map.
"""
import torch
import torch.nn.functional as F

from ._torch import graph_task, in_plain_eager_mode, made_by, needs_operators, will_run

__all__ = ['share_weight', 'shared_linear']


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear; on a CPU with the weight as the left factor, which takes half the time for batches of images."""
    if x.device.type == 'cpu' and x.shape[0] > 1:
        return (weight @ x.t()).t()
    return F.linear(x, weight)


class _ShareWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.set_materialize_grads(False)
        ctx.steps = {}  # by backward pass: there may be several at a time
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        steps = ctx.steps.pop(graph_task(), None)
        if steps is None:
            return grad
        inputs, grads = zip(*steps)
        product = torch.cat(grads).t() @ torch.cat(inputs)
        return product if grad is None else product + grad


class _SharedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.share = weight.grad_fn
        ctx.save_for_backward(x, weight)
        return _linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if needs_operators(grad):
            return grad_x, grad.t() @ x
        if will_run(ctx.share):  # not in a backward pass through a part of the graph
            ctx.share.steps.setdefault(graph_task(), []).append((x.detach(), grad))
        return grad_x, None


def share_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a linear map [D_out, D_in] for use by `shared_linear` in several steps; under autocast, cast once.

    To be called in each forward pass, as its result is part of that pass.
    """
    if not (in_plain_eager_mode(weight) and torch.is_grad_enabled() and weight.requires_grad):
        return weight
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    return _ShareWeight.apply(weight)


def shared_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Linear map without bias: [B, D_in], [D_out, D_in] -> [B, D_out]"""
    if torch.jit.is_scripting():
        return F.linear(x, weight)
    if not in_plain_eager_mode(x):
        return F.linear(x, weight)
    if made_by(weight, _ShareWeight):
        return _SharedLinear.apply(x.to(weight.dtype), weight)
    return _linear(x, weight)
