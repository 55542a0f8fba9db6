"""One step of the LSTM cell that all blocks share (eq. 3)."""
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._torch import in_functorch_transform, in_plain_eager_mode
from .vanilla import is_vanilla

__all__ = ['CellWeights', 'FoldedCell', 'LSTMState', 'StepFunction', 'lstm_step_reference', 'step_function']

LSTMState = Tuple[torch.Tensor, torch.Tensor]  # hidden state h and cell state c, [B, M] each
StepFunction = Callable[[torch.Tensor, Optional[LSTMState]], LSTMState]  # an LSTMCell, or what computes the same


def lstm_step_reference(
        x: torch.Tensor,
        state: Optional[LSTMState],
        weight_ih: torch.Tensor,
        weight_hh: torch.Tensor,
        bias: torch.Tensor,
) -> LSTMState:
    """Equation 3, naive. Arguments as in `CellWeights`."""
    h, c = state or x.new_zeros(2, len(x), weight_hh.shape[1])
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class CellWeights:
    """Weights of an LSTM cell, prepared once in a forward pass, for steps with any number of rows.

    Args:
        weight_ih: [4M, N], gates in the order i, f, g, o; None if the steps are given input gates instead of contexts.
        weight_hh: [4M, M].
        bias: [4M], the sum of the cell's two; None together with `weight_ih`.
        by_gate: Compute the four gates as a batch of four products, where there is more than one row: one product with
            few rows does not keep the threads of a CPU busy (docs/design.md has the figures).
    """

    def __init__(
            self,
            weight_ih: Optional[torch.Tensor],
            weight_hh: torch.Tensor,
            bias: Optional[torch.Tensor],
            by_gate: bool = False,
    ):
        self.weight_ih = weight_ih
        self.weight_hh = weight_hh
        self.bias = bias
        self.by_gate = by_gate

    def __call__(self, x: torch.Tensor, state: Optional[LSTMState]) -> LSTMState:
        """Context [B, N] or input gates [B, 4M]; h and c, None for zeros -> h and c, [B, M] each; h lies in (-1, 1)"""
        i, f, g, o = self.gates(x, state)
        c = i.sigmoid() * g.tanh()
        if state is not None:
            c = torch.addcmul(c, f.sigmoid(), state[1])
        return o.sigmoid() * c.tanh(), c

    def gates(self, x: torch.Tensor, state: Optional[LSTMState]) -> List[torch.Tensor]:
        """The four gates before their activations, [B, M] each."""
        if not torch.jit.is_scripting():
            if self.by_gate and len(x) > 1:
                return self.batched_gates(x, state)
        weight_ih = self.weight_ih
        gates = x if weight_ih is None else F.linear(x, weight_ih, self.bias)  # [B, 4M]
        if state is not None:
            gates = torch.addmm(gates, state[0], self.weight_hh.t())
        return gates.unflatten(1, (4, -1)).unbind(1)  # not chunk(), whose backward forgets a gate in TorchScript

    @torch.jit.unused
    def batched_gates(self, x: torch.Tensor, state: Optional[LSTMState]) -> List[torch.Tensor]:
        """The same, `by_gate`."""
        if self.weight_ih is None:
            gates = x.unflatten(1, (4, -1)).permute(1, 2, 0)  # [4, M, B]
        else:
            gates = _batched_product(self.bias.view(4, -1, 1), self.weight_ih, x)
        if state is not None:
            gates = _batched_product(gates, self.weight_hh, state[0])
        return gates.transpose(1, 2).unbind(0)


def _batched_product(gates: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gates [4, M, 1] or [4, M, B] plus weight [4M, D] times x [B, D], as [4, M, B]"""
    return torch.baddbmm(gates, weight.unflatten(0, (4, -1)), x.t().expand(4, -1, -1))


def step_function(cell: nn.Module) -> StepFunction:
    """What takes the steps of one forward pass.

    The cell itself is called, unless it is vanilla and its formula is faster: compiled, as a part of the graph, and in
    eager mode on a CPU, gate by gate. Under torch.func it is the formula, too: nn.LSTMCell fails under vmap.

    Args:
        cell: An nn.LSTMCell, or any module that is called like one.
    """
    formula = torch.compiler.is_compiling() or in_functorch_transform()
    parameters = (nn.Parameter, torch.Tensor) if formula else (nn.Parameter,)  # functional_call puts tensors there
    if not is_vanilla(cell, nn.LSTMCell, parameters) or not cell.bias:
        return cell
    by_gate = prefers_gates(cell.weight_ih)
    if not by_gate and not formula:
        return cell
    return CellWeights(cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh, by_gate)


def prefers_gates(x: torch.Tensor) -> bool:
    """True in ordinary eager execution on a CPU without autocast, which would cast the weights anew at each step."""
    return in_plain_eager_mode(x) and x.device.type == 'cpu' and not torch.is_autocast_enabled('cpu')


class FoldedCell(nn.Module):
    """LSTM cell of a folded network: like nn.LSTMCell, but each block gives it the input gates, [B, 4M].

    Args:
        weight_hh: [4M, M], as in the LSTMCell.
    """

    def __init__(self, weight_hh: nn.Parameter):
        super().__init__()
        self.weight_hh = weight_hh

    def forward(self, gates: torch.Tensor, state: Optional[LSTMState] = None) -> LSTMState:
        """Input gates [B, 4M]; h and c, None for zeros -> h and c, [B, M] each"""
        by_gate = False
        if not torch.jit.is_scripting():
            by_gate = prefers_gates(gates)
        return CellWeights(None, self.weight_hh, None, by_gate)(gates, state)
