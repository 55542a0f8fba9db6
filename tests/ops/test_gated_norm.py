"""The gated norm: its fused form against its reference, its passes against torch. test_blocks.py has it in networks."""
import gc
from collections import Counter

import pytest
import torch
import torch.nn as nn
from helpers import assert_close, images, randn, tiny_model

from timm_rla.ops.gated_norm import GatedNorm, GatedNormReference, cpu, form, fused, gated_norm, set_form

B, C, H, W = 3, 5, 4, 3


def batch_norm(**kwargs):
    """With slopes of either sign, and one of zero, at which timm starts each residual branch."""
    norm = nn.BatchNorm2d(C, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.7, -1.3, 0., 1.1, 0.4]))
        norm.bias.copy_(randn(C, seed=9))
    return norm


def reference_of(z, norm):
    return GatedNormReference(z, norm.weight, norm.bias, norm.eps)


def by_formula(function):
    """The form of compiled networks."""
    return torch.compile(function, backend='eager', fullgraph=True)


def inputs_of(out_dim, **kwargs):
    """z, shortcut, weights of a gate, and the norm."""
    tensors = randn(B, C, H, W), randn(B, C, H, W, seed=1), randn(C, out_dim, seed=2)
    return *(x.requires_grad_() for x in tensors), batch_norm(**kwargs)


def block(z, shortcut, weight, norm, pool, make):
    """As in a block: the gate depends on what is pooled of the norm's output."""
    a = make(z, norm)
    pooled = getattr(a, pool)()
    return a.gate_and_add((pooled @ weight).sigmoid(), shortcut), pooled


@pytest.mark.parametrize('pool', ['mean_pooled', 'max_pooled'])
@pytest.mark.parametrize('out_dim', [1, C])
@pytest.mark.parametrize('wrap', [lambda function: function, by_formula], ids=['passes', 'formula'])
def test_equals_reference(wrap, out_dim, pool):
    """Value, first and second derivatives."""
    found = []
    for make, around in (gated_norm, wrap), (reference_of, lambda function: function):
        z, shortcut, weight, norm = inputs_of(out_dim)
        inputs = [z, shortcut, weight, norm.weight, norm.bias]
        out, pooled = around(block)(z, shortcut, weight, norm, pool, make)
        value = (out * randn(B, C, H, W, seed=3)).sum() + pooled.square().sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        plain = torch.autograd.grad(  # without a graph of their own: by the passes
            sum(x.square().sum() for x in around(block)(z, shortcut, weight, norm, pool, make)), inputs)
        found.append([out, pooled, *first, *second, *plain])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, tol=1e-11)


def test_both_forms_are_the_ones_that_are_meant():
    z, _, _, norm = inputs_of(1)
    a = gated_norm(z, norm)
    assert type(a) is GatedNorm and a.shared.passes is cpu
    kinds = []

    def function(z):
        a = gated_norm(z, norm)
        kinds.append(a.shared)
        return a.mean_pooled()

    by_formula(function)(z)
    assert kinds == [None]


def test_against_finite_differences():
    norm = nn.BatchNorm2d(3, dtype=torch.float64)

    def function(z, gate, shortcut, weight, bias):
        norm._parameters.update(weight=weight, bias=bias)
        a = gated_norm(z, norm)
        return a.gate_and_add(gate + a.mean_pooled(), shortcut), a.mean_pooled(), a.max_pooled()

    maps = randn(2, 3, 3, 2), randn(2, 3, seed=1).sigmoid(), randn(2, 3, 3, 2, seed=2)
    inputs = [x.requires_grad_() for x in (*maps, randn(3, seed=3), randn(3, seed=4))]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize('use', ['mean_pooled', 'max_pooled', 'gate_and_add'])
def test_gradients_of_a_part(use):
    """Only what is pooled, or only the feature map, is used."""
    found = []
    for make in gated_norm, reference_of:
        z, shortcut, _, norm = inputs_of(1)
        a = make(z, norm)
        out = getattr(a, use)(*((randn(B, 1, seed=4), shortcut) if use == 'gate_and_add' else ()))
        found.append(torch.autograd.grad(out.sin().sum(), [z, norm.weight, norm.bias]))
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, tol=1e-11)


def test_batch_of_gradients():
    z, shortcut, weight, norm = inputs_of(1)
    found, directions = [], randn(4, B, C, H, W, seed=5)
    for make in gated_norm, reference_of:
        out, _ = block(z, shortcut, weight, norm, 'mean_pooled', make)
        inputs = [z, shortcut, weight, norm.weight, norm.bias]
        found.append(torch.autograd.grad(out, inputs, directions, is_grads_batched=True))
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, tol=1e-11)


def test_bias_may_change_before_the_backward_pass():
    """As when an optimizer trains biases alone: batch norm does not keep its bias, either."""
    found = []
    for make in gated_norm, reference_of:
        z, shortcut, weight, norm = inputs_of(1)
        out, _ = block(z, shortcut, weight, norm, 'mean_pooled', make)
        with torch.no_grad():
            norm.bias.add_(1)
        inputs = [z, norm.weight, norm.bias]
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)])
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, tol=1e-11)


@pytest.mark.parametrize('kwargs', [
    {}, dict(momentum=0.9), dict(momentum=None), dict(eps=0.3), dict(track_running_stats=False),
], ids=str)
@pytest.mark.parametrize('wrap', [lambda function: function, by_formula], ids=['passes', 'formula'])
def test_running_statistics_are_those_of_batch_norm(wrap, kwargs):
    norm, expected = batch_norm(**kwargs), batch_norm(**kwargs)
    step = wrap(lambda z: gated_norm(z, norm).mean_pooled())
    for seed in range(3):
        z = 2 * randn(B, C, H, W, seed=seed) + 1
        assert_close(step(z), expected(z).mean((2, 3)))
    assert list(norm.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert_close(norm.state_dict()[name], value)


def test_running_statistics_may_be_switched_off_for_a_while():
    norm, expected = batch_norm(), batch_norm()
    norm.track_running_stats = expected.track_running_stats = False
    z = randn(B, C, H, W)
    gated_norm(z, norm)
    expected(z)
    for name, value in expected.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)


@pytest.mark.parametrize('attributes', [
    dict(momentum=None, num_batches_tracked=None), dict(num_batches_tracked=None),
    dict(running_mean=None, running_var=None),
], ids=str)
def test_parts_of_the_running_statistics_may_be_missing(attributes):
    norm, expected = batch_norm(), batch_norm()
    for name, value in attributes.items():
        setattr(norm, name, value), setattr(expected, name, value)
    z = randn(B, C, H, W)
    assert_close(gated_norm(z, norm).mean_pooled(), expected(z).mean((2, 3)))
    assert list(norm.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert_close(norm.state_dict()[name], value)


def test_statistics_are_stable_far_from_zero():
    """var = E[z^2] - E[z]^2 would lose everything in float32 here."""
    z = 1e4 + randn(2, 3, 8, 8, dtype=torch.float32)
    norm = nn.BatchNorm2d(3)
    y = gated_norm(z, norm).gate_and_add(torch.ones(2, 1), torch.full_like(z, 10.)) - 10
    expected = nn.BatchNorm2d(3).double()(z.double())
    assert (y - expected).abs().max() < 5e-3
    assert (norm.running_var - (0.9 + 0.1 * z.double().var((0, 2, 3)))).abs().max() < 1e-3


@pytest.mark.parametrize('convert', [
    lambda z: z.bfloat16(),
    lambda z: z.half(),
    lambda z: z.contiguous(memory_format=torch.channels_last),
    lambda z: z[:, :, :, ::2],
    lambda z: z[:0],
    lambda z: z[:1, :, :1, :1],  # nothing to normalise by: batch norm then says so
    lambda z: z.to('meta'),
], ids=['bfloat16', 'float16', 'channels_last', 'strided', 'empty', 'one_value', 'meta'])
def test_no_fused_form(convert):
    z, norm = randn(B, C, H, W), batch_norm()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert gated_norm(convert(z), norm) is None
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    assert gated_norm(z, norm) is not None


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_no_fused_form_under_functorch_forward_ad_and_tracing():
    z, norm, found = randn(B, C, H, W), batch_norm(), []

    def function(z):
        found.append(gated_norm(z, norm))
        return z.sum()

    torch.func.grad(function)(z)
    torch.vmap(function)(z[None])
    torch.func.jvp(function, (z,), (z,))
    with torch.autograd.forward_ad.dual_level():
        function(z)
    torch.jit.trace(function, z, check_trace=False)
    assert found == [None] * 5
    assert gated_norm(z, norm) is not None


@pytest.mark.parametrize('name, passes', [('on', True), ('triton', True), ('off', False)])
def test_form(name, passes):
    set_form(name)
    assert form() == name
    assert (gated_norm(randn(B, C, H, W), batch_norm()) is not None) == passes


@pytest.mark.parametrize('name', ['', 'yes', 'On'])
def test_unknown_form(name):
    before = form()
    with pytest.raises(ValueError, match=f'^TIMM_RLA_FUSED must be one of off, on, triton, not {name!r}$'):
        set_form(name)
    assert form() == before


def test_cpu_passes():
    z, shortcut, grad = (randn(2, 3, 5, 4, seed=seed) for seed in range(3))
    mean, scale, shift = (randn(2, 3, seed=seed) for seed in range(3, 6))
    assert cpu.available(z) and not cpu.available(z.half()) and not cpu.available(z.transpose(2, 3))
    for got, expected in zip(cpu.statistics(z), (z.mean((2, 3)), z.var((2, 3), correction=0)), strict=True):
        assert_close(got, expected, tol=1e-13)
    centred = z - mean[:, :, None, None]
    out = cpu.apply(z, mean, scale, shift, shortcut)
    expected = (centred * scale[:, :, None, None] + shift[:, :, None, None] + shortcut).clamp(min=0)
    assert_close(out, expected, tol=1e-13)
    g, sum_g, sum_gz = cpu.reduce(grad, out, z, mean)
    torch.testing.assert_close(g, torch.where(out > 0, grad, 0.))
    assert_close(sum_g, g.sum((2, 3)), tol=1e-13)
    assert_close(sum_gz, (g * centred).sum((2, 3)), tol=1e-13)
    dz = cpu.combine(g, z, mean, scale, shift, mean)
    expected = g * scale[:, :, None, None] + centred * shift[:, :, None, None] + mean[:, :, None, None]
    assert_close(dz, expected, tol=1e-13)


@pytest.fixture
def nothing_else():
    """Python's collector sees only what is made from here on."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize('use', ['backward', 'forward', 'retain', 'partial', 'twice'])
def test_nothing_outlives_a_step(use, nothing_else):
    """Neither memory nor nodes of the graph: a circle through C++ would be out of the reach of Python's collector."""
    kinds = (fused._Normalize._backward_cls, fused._GateAndAdd._backward_cls, fused._Shared)

    def count():
        gc.collect()
        types = Counter(type(o) for o in gc.get_objects())
        return [types[kind] for kind in kinds]

    model, x = tiny_model('bottleneck'), images('bottleneck').requires_grad_()
    for _ in range(3):
        y = model(x).sum()
        assert count() == [5, 5, 5]  # one for each block: that they would be seen
        if use == 'backward':
            y.backward()
        elif use == 'retain':
            y.backward(retain_graph=True)
        elif use == 'partial':
            torch.autograd.grad(y, x, retain_graph=True)
        elif use == 'twice':
            grad, = torch.autograd.grad(y, x, create_graph=True)
            grad.square().sum().backward()
            del grad
        del y
        model.zero_grad()
        x.grad = None
    assert count() == [0, 0, 0]
