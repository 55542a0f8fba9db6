"""Nothing is timed before it is verified: each op of layer attention against its naive reference.

The op runs as the models of a setting will run it: on the same device, in the same precision and layout, compiled or
not, with gradients in training and in inference mode otherwise. The reference runs in float64 on the same values.
"""
from contextlib import nullcontext
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..common.errors import UserError
from ..ops.gated_norm import GatedNormReference, gated_norm
from ..ops.lstm import FoldedCell, lstm_step_reference, step_function
from .precision import PRECISIONS, Precision
from .suites import Setting

__all__ = ['TOLERANCES', 'verify']

# Largest difference, in relation to the largest value of the reference: several times what rounding in a type makes.
# An op that leaves out a term or takes a wrong factor deviates by more.
TOLERANCES = {
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
SHAPES = {  # C, H and W: of a large network, and without a round number; whether there is a gate for each channel
    (128, 56, 56): False,
    (20, 7, 5): True,
}
MAX_BATCH = 3
CONTEXT_DIM, HIDDEN_DIM = 48, 32  # N and M
# Where the output of a ReLU is this close to its kink, rounding decides whether a gradient passes
MARGIN = 0.25

Tensors = Sequence[torch.Tensor]


class Case(NamedTuple):
    """An op, its reference, and what both are given."""
    op: str  # its name in messages
    run: Callable[..., Optional[Tensors]]  # of the inputs; None where there is nothing to verify
    reference: Callable[..., Tensors]  # of inputs and parameters
    outputs: Sequence[str]  # names of what both return
    inputs: Tensors
    input_names: Sequence[str]
    parameters: Tensors = ()  # of modules that `run` uses
    parameter_names: Sequence[str] = ()


class Maker:
    """Makes the tensors of a setting, the same in every process."""

    def __init__(self, setting: Setting, precision: Precision):
        self.device = setting.device
        self.precision = precision
        self.layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.batch = min(setting.batch_size, MAX_BATCH)
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, *shape: int) -> torch.Tensor:
        """Normally distributed [B, ...], of the type of feature maps."""
        values = torch.randn(self.batch, *shape, generator=self.generator)
        return values.to(self.device, self.precision.features)

    def maps(self, *shape: int) -> torch.Tensor:
        """The same [B, C, H, W], in the layout of feature maps."""
        return self.rows(*shape).contiguous(memory_format=self.layout)

    def fill(self, module: nn.Module, scale: float = 1.) -> nn.Module:
        """Normally distributed parameters; of a norm's running statistics nothing is changed."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=self.generator))
        return module.to(self.device, self.precision.dtype)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Normally distributed, of a tensor's shape and type: a gradient for it."""
        return torch.randn(x.shape, generator=self.generator).to(x)


def verify(setting: Setting, backend: str = '') -> None:
    """Compare the ops with their references as a setting runs them.

    Args:
        setting: Device, precision, layout, mode, batch size; and how it is compiled.
        backend: Of torch.compile, for models that compile their ops by themselves.

    Raises:
        UserError: An op deviates; names op, quantity, deviation and tolerance.
    """
    precision = PRECISIONS[setting.precision]
    make = Maker(setting, precision)
    backend = setting.torchcompile or backend
    how = f'{setting.precision} on {setting.device}, {"compiled" if backend else "eager"}'
    gated_norms = [_gated_norm_case(make, shape, per_channel) for shape, per_channel in SHAPES.items()]
    for case in [*gated_norms, _step_case(make), _folded_step_case(make)]:
        if backend:
            case = case._replace(run=torch.compile(
                case.run, backend=backend, mode=setting.torchcompile_mode or None, dynamic=False, fullgraph=True))
        tolerance = _tolerance(case, setting, precision)
        for quantity, deviation in _deviations(case, setting, make):
            if not deviation <= tolerance:  # NaN is none
                raise UserError(f'{case.op}, {how}: {quantity} deviates from the reference by {deviation:.2g} of its '
                                f'largest value, the tolerance is {tolerance:g}; nothing was measured')
    if backend:
        torch.compiler.reset()  # the model itself starts with nothing compiled


def _tolerance(case: Case, setting: Setting, precision: Precision) -> float:
    dtype = precision.features
    if dtype == torch.float32 and setting.device_type == 'cuda' and case.op != 'gated norm':
        dtype = torch.float16  # TF32 has as many bits
    return TOLERANCES[dtype]


def _gated_norm_case(make: Maker, shape: Tuple[int, int, int], per_channel: bool) -> Case:
    channels = shape[0]
    norm = make.fill(nn.BatchNorm2d(channels))
    z, shortcut = 2 * make.maps(*shape) + 1, make.maps(*shape)
    gate = make.rows(channels if per_channel else 1).sigmoid()
    features = GatedNormReference(*_exact(z, norm.weight, norm.bias), norm.eps).features
    output = gate.double()[:, :, None, None] * features + shortcut
    away = torch.where(output < 0, -2 * MARGIN, 2 * MARGIN) * (output.abs() < MARGIN)
    shortcut = (shortcut + away.to(shortcut)).detach()

    def run(z: torch.Tensor, gate: torch.Tensor, shortcut: torch.Tensor) -> Optional[Tensors]:
        fused = gated_norm(z, norm)
        return None if fused is None else _uses(fused, gate, shortcut)

    def reference(z, gate, shortcut, weight, bias) -> Tensors:
        return _uses(GatedNormReference(z, weight, bias, norm.eps), gate, shortcut)

    return Case(
        'gated norm', run, reference, ('mean pooling', 'max pooling', 'output'),
        (z, gate, shortcut), ('z', f'gate for each {"channel" if per_channel else "image"}', 'shortcut'),
        (norm.weight, norm.bias), ('weight', 'bias'),
    )


def _uses(norm: Any, gate: torch.Tensor, shortcut: torch.Tensor) -> Tensors:
    """All that a block may take from a gated norm."""
    return norm.mean_pooled(), norm.max_pooled(), norm.gate_and_add(gate, shortcut)


def _two_steps(step: Callable, first: torch.Tensor, second: torch.Tensor) -> Tensors:
    """Without a state and with one."""
    state = step(first, None)
    return *state, *step(second, state)


STATES = ('h_1', 'c_1', 'h_2', 'c_2')


def _step_case(make: Maker) -> Case:
    cell = make.fill(nn.LSTMCell(CONTEXT_DIM, HIDDEN_DIM), scale=0.2)

    def run(first: torch.Tensor, second: torch.Tensor) -> Tensors:
        return _two_steps(step_function(cell), first, second)

    def reference(first, second, weight_ih, weight_hh, bias_ih, bias_hh) -> Tensors:
        weights = weight_ih, weight_hh, bias_ih + bias_hh
        return _two_steps(lambda x, state: lstm_step_reference(x, state, *weights), first, second)

    contexts = make.rows(CONTEXT_DIM), make.rows(CONTEXT_DIM)
    names, parameters = zip(*cell.named_parameters())
    return Case('LSTM step', run, reference, STATES, contexts, ('S_1', 'S_2'), parameters, names)


def _folded_step_case(make: Maker) -> Case:
    cell = make.fill(FoldedCell(nn.Parameter(torch.empty(4 * HIDDEN_DIM, HIDDEN_DIM))), scale=0.2)

    def run(first: torch.Tensor, second: torch.Tensor) -> Tensors:
        return _two_steps(cell, first, second)

    def reference(first, second, weight_hh) -> Tensors:
        eye = torch.eye(4 * HIDDEN_DIM, dtype=first.dtype, device=first.device)  # the gates are given
        return _two_steps(lambda x, state: lstm_step_reference(x, state, eye, weight_hh, eye.new_zeros(())),
                          first, second)

    gates = make.rows(4 * HIDDEN_DIM), make.rows(4 * HIDDEN_DIM)
    return Case('folded LSTM step', run, reference, STATES, gates, ('gates_1', 'gates_2'), (cell.weight_hh,),
                ('weight_hh',))


def _exact(*tensors: torch.Tensor) -> List[torch.Tensor]:
    return [x.detach().double() for x in tensors]


def _deviations(case: Case, setting: Setting, make: Maker) -> Iterator[Tuple[str, float]]:
    """Of each output and, in training, each gradient: its name and `_deviation`; none where the op has no fast form."""
    training = setting.mode == 'train'
    inputs = [x.detach().requires_grad_(training) for x in case.inputs]
    with nullcontext() if training else torch.inference_mode(), make.precision.context(setting.device_type):
        outputs = case.run(*inputs)
    if outputs is None:
        return
    exact = [x.requires_grad_(training) for x in _exact(*inputs, *case.parameters)]
    expected = case.reference(*exact)
    yield from zip(case.outputs, map(_deviation, outputs, expected))
    if training:
        directions = [make.like(x) for x in outputs]
        found = torch.autograd.grad(outputs, [*inputs, *case.parameters], directions, allow_unused=True)
        wanted = torch.autograd.grad(expected, exact, _exact(*directions))
        names = [f'gradient of {name}' for name in (*case.input_names, *case.parameter_names)]
        yield from zip(names, map(_deviation, found, wanted))


def _deviation(got: Optional[torch.Tensor], expected: torch.Tensor) -> float:
    """Largest difference in relation to the largest value; infinite for what is missing or of another shape."""
    if got is None or got.shape != expected.shape:
        return float('inf')
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((got.double() - expected).abs().max() / largest).item()


