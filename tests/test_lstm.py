"""The shared LSTM cell against torch.nn.LSTMCell, and the gradients that it collects over its steps."""
import copy

import pytest
import torch
import torch.nn as nn

from timm_rla.lstm import LSTMState, lstm_step, lstm_weights

B, M, N = 3, 5, 7
STEPS = 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def cell():
    torch.manual_seed(1)
    return nn.LSTMCell(N, M, dtype=torch.float64)


@pytest.fixture
def contexts():
    return [randn(B, N, seed=seed).requires_grad_() for seed in range(10, 10 + STEPS)]


def step(cell, context, state):
    weights, = lstm_weights(*cell.parameters(), steps=1, batch=len(context))
    return lstm_step(context, state, weights)


def run(cell, contexts, state=None, steps=STEPS):
    """A value that depends on every hidden state and on the last cell state."""
    value = 0
    for i, (context, weights) in enumerate(zip(contexts, lstm_weights(*cell.parameters(), steps, B))):
        state = lstm_step(context, state, weights)
        value = value + (state.h * randn(B, M, seed=i)).sum()
    return value + state.c.square().sum()


def run_torch(cell, contexts, state=None):
    state = state or LSTMState(*torch.zeros(2, B, M, dtype=torch.float64))
    value = 0
    for i, context in enumerate(contexts):
        state = cell(context, state)
        value = value + (state[0] * randn(B, M, seed=i)).sum()
    return value + state[1].square().sum()


def assert_close(actual, expected, tol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize('grad', [True, False])
def test_step_equals_lstm_cell(cell, grad):
    state = expected = LSTMState(randn(B, M, seed=2), randn(B, M, seed=3))
    with torch.set_grad_enabled(grad):
        for seed in range(10, 14):
            context = randn(B, N, seed=seed)
            state, expected = step(cell, context, state), cell(context, expected)
            assert_close(state.h, expected[0])
            assert_close(state.c, expected[1])


def test_step_without_state_starts_from_zeros(cell):
    context = 10 * randn(B, N)
    zeros = torch.zeros(B, M, dtype=torch.float64)
    state = step(cell, context, None)
    for expected in (step(cell, context, LSTMState(zeros, zeros)), cell(context, (zeros, zeros))):
        assert_close(state.h, expected[0])
        assert_close(state.c, expected[1])
    assert state.h.abs().max() < 1


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('steps', [STEPS, STEPS + 2])
def test_gradients_equal_lstm_cell(cell, contexts, steps, first):
    """First and second ones, of weights, contexts and the state at the start."""
    state = [] if first else [randn(B, M, seed=s).requires_grad_() for s in (2, 3)]
    inputs = [*cell.parameters(), *contexts, *state]
    start = LSTMState(*state) if state else None
    for create_graph in False, True:
        got, expected = (
            torch.autograd.grad(value, inputs, create_graph=create_graph)
            for value in (run(cell, contexts, start, steps), run_torch(cell, contexts, start)))
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e)
    got, expected = (
        torch.autograd.grad(sum(g.sin().sum() for g in gradients), inputs) for gradients in (got, expected))
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


def test_batch_of_gradients(cell, contexts):
    inputs = [*cell.parameters(), *contexts[:2]]
    weights = lstm_weights(*cell.parameters(), 2, B)
    state = lstm_step(contexts[1], lstm_step(contexts[0], None, weights[0]), weights[1])
    expected = cell(contexts[1], cell(contexts[0]))
    directions = randn(3, B, M)
    got, expected = (
        torch.autograd.grad(h, inputs, directions, is_grads_batched=True) for h in (state.h, expected[0]))
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


def test_part_of_the_steps(cell, contexts):
    """Gradients of a step alone, whose state is not differentiated."""
    weights = lstm_weights(*cell.parameters(), STEPS, B)
    state = LSTMState(*(x.detach() for x in lstm_step(contexts[0], None, weights[0])))
    got = torch.autograd.grad(lstm_step(contexts[1], state, weights[1]).h.sum(), [*cell.parameters(), contexts[1]])
    expected = torch.autograd.grad(cell(contexts[1], state)[0].sum(), [*cell.parameters(), contexts[1]])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e)


@pytest.mark.parametrize('frozen', ['weight_ih', 'weight_hh', 'bias', 'contexts', '.'])
def test_what_is_frozen_gets_no_gradient(cell, contexts, frozen):
    for name, parameter in cell.named_parameters():
        parameter.requires_grad = not (frozen == '.' or name.startswith(frozen))
    if frozen == 'contexts':
        contexts = [context.detach() for context in contexts]
    other = copy.deepcopy(cell)
    run(cell, contexts).backward()
    image = [context.grad for context in contexts]
    for context in contexts:
        context.grad = None
    run_torch(other, contexts).backward()
    for got, expected in zip(
            [*image, *(p.grad for p in cell.parameters())],
            [*(context.grad for context in contexts), *(p.grad for p in other.parameters())], strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(got, expected)


def test_autocast(cell, contexts):
    """Products in bfloat16, the rest, and the sum for the bias, in float32."""
    cell, contexts = cell.float(), [context.detach().float() for context in contexts]
    with torch.autocast('cpu', torch.bfloat16):
        weights = lstm_weights(*cell.parameters(), 2, B)
        state = lstm_step(contexts[1], lstm_step(contexts[0], None, weights[0]), weights[1])
    assert state.h.dtype == state.c.dtype == torch.float32 and weights[0].weight_ih.dtype == torch.bfloat16
    got = torch.autograd.grad(state.h.sum(), list(cell.parameters()))
    expected = torch.autograd.grad(cell(contexts[1], cell(contexts[0]))[0].sum(), list(cell.parameters()))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, e, rtol=0.05, atol=0.02)
