"""The LSTM cell that all blocks share (eq. 3), with few operators and the gradient of its weights as one product.

Each of L steps adds G_l^T X_l to the gradient of a weight, where X_l is what the weight multiplies, the context or the
hidden state, and G_l the gradient of the gates: L products of rank B that each write a matrix as large as the weight,
and L - 1 sums of these. One product over the stacked rows does the same. To bring the rows together, each step holds
tensors of zeros that `lstm_weights` made of the weights, and sends G_l and X_l there as their gradients. The state of
all that is the graph itself: it may be compiled, differentiated twice, or run in parts.
"""
import math
from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F

from ._torch import needs_operators, takes_autograd_functions
from .autograd import differentiate

__all__ = ['LSTMState', 'LSTMWeights', 'lstm_step', 'lstm_weights']

aten = torch.ops.aten
PARTS = 4  # of a weight, for as many threads or fewer; 2 to 8 took the same time on two


class LSTMState(NamedTuple):
    """What the recurrent path carries from block to block."""
    h: torch.Tensor  # hidden state [B, M]
    c: torch.Tensor  # cell state [B, M]


class LSTMWeights(NamedTuple):
    """The weights of the cell as one step holds them, in the layout of torch.nn.LSTMCell (gates i, f, g, o).

    Each step has its own zeros: the gradients of two would add up. Without them the weights are used as any others.
    """
    weight_ih: torch.Tensor  # [4M, N]
    weight_hh: torch.Tensor  # [4M, M]
    bias: torch.Tensor  # [4M], the sum of the cell's two
    gates: Optional[torch.Tensor] = None  # zeros [4M, B], whose gradient is that of the gates
    context: Optional[torch.Tensor] = None  # zeros [B, N], whose gradient is S_l
    hidden: Optional[torch.Tensor] = None  # zeros [B, M], whose gradient is h_{l-1}


def _add_product(gates: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gates [4, M, B] or [4, M, 1], and weight [4M, D] times x [B, D] in addition.

    On a CPU gate by gate. One product of a matrix and few columns, or a single one, does not keep the threads of a BLAS
    library busy; a batch of products does.
    """
    if x.device.type == 'cpu' and gates.dtype == weight.dtype:
        return torch.baddbmm(gates, weight.unflatten(0, (4, -1)), x.t().expand(4, -1, -1))
    return gates + (weight @ x.t()).unflatten(0, (4, -1))


def _times_transposed(weight: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The transposed weight [4M, D] times gates [4M, B], as [B, D]; on a CPU part by part, as above."""
    gates = gates.to(weight.dtype).t()
    if gates.device.type != 'cpu':
        return gates @ weight
    parts = weight.unflatten(1, (math.gcd(weight.shape[1], PARTS), -1)).transpose(0, 1)
    return torch.bmm(gates.expand(len(parts), -1, -1), parts).transpose(0, 1).reshape(-1, weight.shape[1])


def _gates(
        x: torch.Tensor,
        h: Optional[torch.Tensor],
        weight_ih: torch.Tensor,
        weight_hh: torch.Tensor,
        bias: torch.Tensor,
) -> List[torch.Tensor]:
    """What goes into the activations of the four gates, [B, M] each, in eager mode transposed in memory."""
    if not torch.jit.is_scripting():
        if takes_autograd_functions(x):
            gates = _add_product(bias.unflatten(0, (4, -1)).unsqueeze(2), weight_ih, x)
            if h is not None:
                gates = _add_product(gates, weight_hh, h)
            return gates.transpose(1, 2).unbind(0)
    gates = F.linear(x, weight_ih, bias)
    if h is not None:
        gates = gates + F.linear(h, weight_hh)
    return gates.unflatten(1, (4, -1)).unbind(1)  # not chunk(), whose backward forgets a gate in TorchScript


def _activate(gates: List[torch.Tensor], c: Optional[torch.Tensor]) -> List[torch.Tensor]:
    """Activations of the gates i, f, g and o, the new cell state and its hyperbolic tangent, [B, M] each."""
    i, f, g, o = gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
    c = i * g if c is None else torch.addcmul(f * c, i, g)
    return [i, f, g, o, c, c.tanh()]


class _Share(torch.autograd.Function):
    """The zeros of all steps: for gates, context and hidden state of the first, of the second and so on."""

    @staticmethod
    def forward(ctx, weight_ih, weight_hh, bias, steps, batch):
        ctx.set_materialize_grads(False)
        ctx.dtype = weight_ih.dtype
        shapes = (len(bias), batch), (batch, weight_ih.shape[1]), (batch, weight_hh.shape[1])
        zeros = bias.new_zeros(()), weight_ih.new_zeros(()), weight_hh.new_zeros(())
        return tuple(zero.expand(shape) for _ in range(steps) for zero, shape in zip(zeros, shapes))

    @staticmethod
    def backward(ctx, *grads):
        gates, context, hidden = ([grad for grad in grads[i::3] if grad is not None] for i in range(3))
        gates, context = torch.cat(gates, 1), torch.cat(context)
        columns = gates.to(ctx.dtype)
        grad_hh = None
        if hidden:
            hidden = torch.cat(hidden)
            grad_hh = columns[:, -len(hidden):] @ hidden  # the first step, if it is among them, has no hidden state
        return columns @ context, grad_hh, gates.sum(1), None, None


class _Step(torch.autograd.Function):
    """One step, which leaves the gradients of the weights to `_Share`."""

    @staticmethod
    def forward(ctx, x, h, c, weight_ih, weight_hh, bias, *zeros):
        i, f, g, o, c_new, t = _activate(_gates(x, h, weight_ih, weight_hh, bias), c)
        ctx.save_for_backward(x, weight_ih, weight_hh, bias, i, f, g, o, t, *(() if h is None else (h, c)))
        return o * t, c_new

    @staticmethod
    def backward(ctx, grad_h, grad_c):
        x, weight_ih, weight_hh, bias, i, f, g, o, t, *state = ctx.saved_tensors
        h, c = state or (None, None)
        if needs_operators(grad_h, grad_c):
            grad_x, grad_h, grad_c, grad = _differentiate_step(x, h, c, weight_ih, weight_hh, bias, (grad_h, grad_c))
        else:
            grad_c = grad_c + aten.tanh_backward(grad_h * o, t)
            grad_f = torch.zeros_like(i) if c is None else aten.sigmoid_backward(grad_c * c, f)
            grad = torch.cat([
                aten.sigmoid_backward(grad_c * g, i).t(),
                grad_f.t(),
                aten.tanh_backward(grad_c * i, g).t(),
                aten.sigmoid_backward(grad_h * t, o).t(),
            ])
            grad_x = _times_transposed(weight_ih, grad) if ctx.needs_input_grad[0] else None
            grad_h, grad_c = (None, None) if c is None else (_times_transposed(weight_hh, grad), grad_c * f)
        return grad_x, grad_h, grad_c, None, None, None, grad, x, h


def _differentiate_step(x, h, c, weight_ih, weight_hh, bias, grads):
    """Gradients of context, hidden and cell state, and of the gates [4M, B], by torch's own operators."""
    if h is None:
        h = c = weight_hh.new_zeros(len(x), weight_hh.shape[1])
    added = bias.new_zeros(len(x), len(bias)).requires_grad_()  # to the gates, whose gradient it has

    def formula(x, h, c, added):
        gates = _gates(x, h, weight_ih, weight_hh, bias)
        gates = [gate + extra for gate, extra in zip(gates, added.unflatten(1, (4, -1)).unbind(1))]
        _, _, _, o, c, t = _activate(gates, c)
        return o * t, c

    grad_x, grad_h, grad_c, grad = differentiate(formula, (x, h, c, added), grads)
    return grad_x, grad_h, grad_c, grad.transpose(-1, -2)


def lstm_weights(
        weight_ih: torch.Tensor,
        weight_hh: torch.Tensor,
        bias_ih: torch.Tensor,
        bias_hh: torch.Tensor,
        steps: int,
        batch: int,
) -> List[LSTMWeights]:
    """The parameters of a torch.nn.LSTMCell for each step of one forward pass; under autocast, cast once.

    Args:
        weight_ih: [4M, N].
        weight_hh: [4M, M].
        bias_ih: [4M].
        bias_hh: [4M].
        steps: How many steps there will be; fewer do no harm.
        batch: B.
    """
    bias = bias_ih + bias_hh
    if not torch.jit.is_scripting():
        if (
            takes_autograd_functions(weight_ih)  # first of all, since a tracer's values are neither true nor false
            and torch.is_grad_enabled()
            and (weight_ih.requires_grad or weight_hh.requires_grad or bias.requires_grad)
        ):
            device = weight_ih.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                weight_ih, weight_hh = weight_ih.to(dtype), weight_hh.to(dtype)
            zeros = _Share.apply(weight_ih, weight_hh, bias, steps, batch)
            return [LSTMWeights(weight_ih, weight_hh, bias, *zeros[i:i + 3]) for i in range(0, 3 * steps, 3)]
    return [LSTMWeights(weight_ih, weight_hh, bias) for _ in range(steps)]


def lstm_step(context: torch.Tensor, state: Optional[LSTMState], weights: LSTMWeights) -> LSTMState:
    """One step of the shared LSTM cell (eq. 3).

    Args:
        context: S_l [B, N].
        state: h_{l-1}, c_{l-1}, each [B, M]; None in front of the first block, where both are zero.
        weights: Weights of the cell.

    Returns:
        h_l, c_l, each [B, M]; h_l lies in (-1, 1).
    """
    h: Optional[torch.Tensor] = None
    c: Optional[torch.Tensor] = None
    if state is not None:
        h, c = state.h, state.c
    if not torch.jit.is_scripting():
        if weights.gates is not None:
            dtype = weights.weight_ih.dtype
            h = None if h is None else h.to(dtype)
            return LSTMState(*_Step.apply(context.to(dtype), h, c, *weights))
    gates = _gates(context, h, weights.weight_ih, weights.weight_hh, weights.bias)
    _, _, _, o, c, t = _activate(gates, c)
    return LSTMState(o * t, c)
