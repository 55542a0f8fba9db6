"""The LSTM step: the reference against torch.nn.LSTMCell, fast forms against the reference, and who takes a step."""
import pytest
import torch
import torch.nn as nn
from helpers import assert_close, randn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rla.ops.lstm import CellWeights, FoldedCell, lstm_step_reference, step_function

B, M, N = 3, 5, 7
STEPS = 3


@pytest.fixture
def cell():
    torch.manual_seed(1)
    return nn.LSTMCell(N, M, dtype=torch.float64)


def weights_of(cell):
    return cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh


def contexts_of(rows, length=N):
    return [randn(rows, length, seed=seed).requires_grad_() for seed in range(10, 10 + STEPS)]


def state_of(rows):
    return randn(rows, M, seed=2).requires_grad_(), randn(rows, M, seed=3).requires_grad_()


def reference_of(cell):
    """The naive step with the weights of a cell."""
    return lambda x, state: lstm_step_reference(x, state, *weights_of(cell))


def run(step, contexts, state):
    """A value that depends on every hidden state and on the last cell state."""
    value = 0
    for i, context in enumerate(contexts):
        state = step(context, state)
        value = value + (state[0] * randn(*state[0].shape, seed=i)).sum()
    return value + state[1].square().sum()


def assert_same_derivatives(steps, inputs, contexts, state):
    """Value, first and second derivatives of a run by each of two steps."""
    found = []
    for step in steps:
        value = run(step, contexts, state)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        found.append([value, *first, *second])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize('rows', [1, B])
@pytest.mark.parametrize('first', [True, False], ids=['first', 'later'])
def test_reference_equals_lstm_cell(cell, first, rows):
    contexts, state = contexts_of(rows), None if first else state_of(rows)
    inputs = [*cell.parameters(), *contexts, *(state or ())]
    assert_same_derivatives([reference_of(cell), cell], inputs, contexts, state)


@pytest.mark.parametrize('rows', [1, B])
@pytest.mark.parametrize('first', [True, False], ids=['first', 'later'])
@pytest.mark.parametrize('by_gate', [False, True])
def test_cell_weights_equal_reference(cell, by_gate, first, rows):
    contexts, state = contexts_of(rows), None if first else state_of(rows)
    inputs = [*cell.parameters(), *contexts, *(state or ())]
    assert_same_derivatives(
        [CellWeights(*weights_of(cell), by_gate), reference_of(cell)], inputs, contexts, state)


@pytest.mark.parametrize('rows', [1, B])
@pytest.mark.parametrize('first', [True, False], ids=['first', 'later'])
@pytest.mark.parametrize('by_gate', [False, True])
def test_input_gates_in_the_place_of_contexts(cell, by_gate, first, rows):
    """Without `weight_ih`, as in a folded network: a step by the identity as weight_ih."""
    gates, state = contexts_of(rows, 4 * M), None if first else state_of(rows)
    eye, zeros = torch.eye(4 * M, dtype=torch.float64), torch.zeros(4 * M, dtype=torch.float64)

    def reference(x, state):
        return lstm_step_reference(x, state, eye, cell.weight_hh, zeros)

    assert_same_derivatives(
        [CellWeights(None, cell.weight_hh, None, by_gate), reference],
        [cell.weight_hh, *gates, *(state or ())], gates, state)
    folded = FoldedCell(cell.weight_hh)
    assert_same_derivatives([folded, reference], [cell.weight_hh, *gates, *(state or ())], gates, state)
    assert list(dict(folded.named_parameters())) == ['weight_hh']


def operators(function):
    """Names of the operators that a function runs."""
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    return names


@pytest.mark.parametrize('by_gate, rows, batched', [(True, B, True), (True, 1, False), (False, B, False)])
def test_products_gate_by_gate_where_there_is_more_than_one_row(cell, by_gate, rows, batched):
    step, context, state = CellWeights(*weights_of(cell), by_gate), randn(rows, N), state_of(rows)
    names = operators(lambda: step(context, state))
    assert names.count('baddbmm') == (2 if batched else 0)
    assert names.count('addmm') == (0 if batched else 2)


@pytest.mark.parametrize('by_gate', [False, True])
def test_number_of_rows_may_change_from_step_to_step(cell, by_gate):
    """Rows of a state are repeated and picked, as a detector does that looks at several regions of an image."""
    index = torch.tensor([2, 0, 0, 1, 2])
    image, region = randn(B, N).requires_grad_(), randn(len(index), N, seed=1).requires_grad_()
    found = []
    for step in CellWeights(*weights_of(cell), by_gate), reference_of(cell), cell:
        h, c = step(image, None)
        h, c = step(region, (h[index], c[index]))
        value = (h.sin() + c.square()).sum()
        found.append([h, c, *torch.autograd.grad(value, [image, region, *cell.parameters()])])
    for got, by_reference, by_torch in zip(*found, strict=True):
        assert_close(got, by_reference)
        assert_close(by_reference, by_torch)


@pytest.mark.parametrize('by_gate', [False, True])
def test_batch_of_gradients(cell, by_gate):
    contexts = contexts_of(B)[:2]
    inputs, directions = [*cell.parameters(), *contexts], randn(3, B, M)
    found = []
    for step in CellWeights(*weights_of(cell), by_gate), cell:
        h, _ = step(contexts[1], step(contexts[0], None))
        found.append(torch.autograd.grad(h, inputs, directions, is_grads_batched=True))
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected)


def test_hidden_state_lies_between_minus_one_and_one(cell):
    state = None
    for seed in range(5):
        state = CellWeights(*weights_of(cell))(100 * randn(B, N, seed=seed), state)
        assert state[0].abs().max() < 1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(cell, dtype):
    """As compiled under autocast: gradients are close to those in float32 and have the type of the weights."""
    cell, contexts = cell.float(), [context.detach().float() for context in contexts_of(B)[:2]]
    with torch.autocast('cpu', dtype):
        step = CellWeights(*weights_of(cell))
        h, _ = step(contexts[1], step(contexts[0], None))
    got = torch.autograd.grad(h.float().sum(), list(cell.parameters()))
    expected = torch.autograd.grad(cell(contexts[1], cell(contexts[0]))[0].sum(), list(cell.parameters()))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e, rtol=0.05, atol=0.02)


# Who takes the steps -----------------------------------------------------------------------------------------------

class Subclass(nn.LSTMCell):
    pass


def hooked(cell):
    cell.register_forward_hook(lambda *_: None)
    return cell


def replaced(cell):
    cell.forward = cell.forward
    return cell


@pytest.mark.parametrize('make', [
    lambda: nn.LSTMCell(N, M, bias=False),
    lambda: nn.LSTMCell(N, M, device='meta'),
    lambda: Subclass(N, M),
    lambda: hooked(nn.LSTMCell(N, M)),
    lambda: replaced(nn.LSTMCell(N, M)),
    lambda: nn.utils.parametrizations.weight_norm(nn.LSTMCell(N, M), 'weight_ih'),
    lambda: FoldedCell(nn.Parameter(torch.zeros(4 * M, M))),
    lambda: nn.Identity(),
], ids=['no_bias', 'meta', 'subclass', 'hook', 'forward', 'parametrised', 'folded', 'any'])
def test_module_that_is_called(make):
    module = make()
    assert step_function(module) is module


def test_vanilla_cell_in_eager_mode_on_a_cpu_goes_gate_by_gate(cell):
    step = step_function(cell)
    assert type(step) is CellWeights and step.by_gate
    assert step.weight_ih is cell.weight_ih and step.weight_hh is cell.weight_hh
    with torch.autocast('cpu', torch.bfloat16):  # which would cast the weights anew at each step
        assert step_function(cell) is cell
    with torch.autocast('cuda', torch.bfloat16, enabled=torch.cuda.is_available()):
        assert type(step_function(cell)) is CellWeights


def test_vanilla_cell_compiled_becomes_a_formula(cell):
    x, kinds = randn(B, N), []

    def step(x):
        step = step_function(cell)
        kinds.append((type(step), step.by_gate))
        return step(x, None)

    got = torch.compile(step, backend='eager', fullgraph=True)(x)
    for g, expected in zip(got, cell(x), strict=True):
        assert_close(g, expected)
    assert kinds == [(CellWeights, False)]


class TwoSteps(nn.Module):
    """As a network takes steps; keeps who took them."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.seen = []

    def forward(self, x):
        step = step_function(self.cell)
        self.seen.append(step if step is self.cell else type(step))
        return step(x, step(x, None))[0]


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_vanilla_cell_is_called_in_a_trace(cell):
    model = TwoSteps(cell)
    traced = torch.jit.trace(model, randn(B, N), check_trace=False)
    assert model.seen == [cell]
    assert_close(traced(randn(2, N, seed=1)), model(randn(2, N, seed=1)))


def test_under_functorch(cell):
    """A formula, since nn.LSTMCell itself fails under vmap; also of parameters that functional_call has put in."""
    model, x = TwoSteps(cell), randn(B, N)
    expected = cell(x, cell(x))[0]
    assert_close(torch.vmap(lambda x: model(x[None])[0])(x), expected)
    jacobian = torch.autograd.functional.jacobian(lambda x: cell(x, cell(x))[0], x)
    assert_close(torch.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(x), jacobian[range(B), :, range(B)])

    scales = torch.tensor([1., 2.], dtype=torch.float64)
    stacked = {name: scales.view(-1, *[1] * p.dim()) * p for name, p in model.named_parameters()}
    got = torch.vmap(torch.func.functional_call, (None, 0, None))(model, stacked, x)
    for scale, h in zip(scales, got, strict=True):
        other = nn.LSTMCell(N, M, dtype=torch.float64)
        other.load_state_dict({name: scale * p for name, p in cell.named_parameters()})
        assert_close(h, other(x, other(x))[0])
    assert set(model.seen) == {CellWeights}

    calls = []
    cell.register_forward_hook(lambda *_: calls.append(1))
    torch.func.grad(lambda x: model(x).sum())(x)
    assert model.seen[-1] is cell and len(calls) == 2
