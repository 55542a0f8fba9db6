import pytest
import torch
from helpers import assert_close, randn
from reference import resample

from timm_rla.layers import CONTEXTS, Context, LayerAttention, resample_context

B = 3


@pytest.mark.parametrize('channels, context_dim', [
    (8, 8), (1, 1),  # nothing to do
    (64, 16), (12, 1), (48, 16),  # C is a multiple of N
    (16, 64), (1, 5), (4, 12),  # N is a multiple of C
    (10, 4), (7, 5), (64, 48), (100, 99), (2048, 1000),  # C > N
    (4, 10), (5, 7), (48, 64), (99, 100), (6, 15),  # C < N
])
def test_resample_context(channels, context_dim):
    x = randn(B, channels)
    y = resample_context(x, channels, context_dim)
    assert y.shape == (B, context_dim)
    assert_close(y, resample(x, context_dim))


def test_resample_context_is_group_mean_or_nearest_repeat():
    x = torch.tensor([[1., 2., 3., 4.]])
    assert resample_context(x, 4, 2).tolist() == [[1.5, 3.5]]
    assert resample_context(x, 4, 8).tolist() == [[1., 1., 2., 2., 3., 3., 4., 4.]]


@pytest.mark.parametrize('channels, context_dim', [(8, 8), (8, 2), (2, 8), (10, 4), (4, 10)])
def test_resample_context_gradient(channels, context_dim):
    x = randn(2, channels).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_context(x, channels, context_dim), x)


@pytest.mark.parametrize('channels, context_dim', [(32, 32), (32, 8), (32, 64), (32, 20), (20, 32), (8, 8)])
@pytest.mark.parametrize('context', CONTEXTS)
def test_context(context, channels, context_dim):
    torch.manual_seed(0)
    module = Context(channels, context_dim, context, dtype=torch.float64)
    x = randn(B, channels, 3, 5)

    pooled = torch.stack([
        torch.stack([x[b, c].max() if 'gmp' in context else x[b, c].sum() / 15 for c in range(channels)])
        for b in range(B)
    ])
    if 'mlp' in context:
        fc1, fc2 = module.mlp.fc1, module.mlp.fc2
        assert fc1.weight.shape == (max(1, channels // 16), channels)  # C / 16; one unit if there are fewer channels
        pooled = (pooled @ fc1.weight.T + fc1.bias).clamp(min=0) @ fc2.weight.T + fc2.bias
    else:
        assert not list(module.parameters())

    y = module(module.pool(x))
    assert y.shape == (B, context_dim)
    assert_close(y, resample(pooled, context_dim))


def test_context_defaults_to_gap():
    x = randn(B, 8, 3, 3)
    context = Context(8, 8)
    assert_close(context(context.pool(x)), x.mean((2, 3)))


@pytest.mark.parametrize('hidden_dim, reduction, out_dim', [(8, 1, 1), (8, 4, 1), (8, 8, 1), (32, 16, 10)])
def test_layer_attention(hidden_dim, reduction, out_dim):
    torch.manual_seed(0)
    module = LayerAttention(hidden_dim, reduction, out_dim, dtype=torch.float64)
    w1, b1, w2, b2 = module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    assert w1.shape == (hidden_dim // reduction, hidden_dim) and w2.shape == (out_dim, hidden_dim // reduction)

    h = randn(B, hidden_dim)
    a = module(h)
    assert a.shape == (B, out_dim)
    assert_close(a, 1 / (1 + torch.exp(-((h @ w1.T + b1).clamp(min=0) @ w2.T + b2))))


@pytest.mark.parametrize('build, message', [
    (lambda: Context(8, 4, 'max'), rf"^context .* {', '.join(CONTEXTS)}, not 'max'$"),
    (lambda: Context(8, 4, None), rf"^context .* {', '.join(CONTEXTS)}, not None$"),
    (lambda: Context(8, 0), '^context_dim .* at least 1, not 0$'),
    (lambda: Context(8, -3), '^context_dim .* at least 1, not -3$'),
    (lambda: LayerAttention(0, 1), '^hidden_dim .* at least 1, not 0$'),
    (lambda: LayerAttention(-2, 1), '^hidden_dim .* at least 1, not -2$'),
    (lambda: LayerAttention(8, 3), '^reduction .* divisor of hidden_dim = 8, not 3$'),
    (lambda: LayerAttention(8, 16), '^reduction .* divisor of hidden_dim = 8, not 16$'),
    (lambda: LayerAttention(8, 0), '^reduction .* divisor of hidden_dim = 8, not 0$'),
    (lambda: LayerAttention(8, -2), '^reduction .* divisor of hidden_dim = 8, not -2$'),
    (lambda: LayerAttention(8, 2.), '^reduction .* divisor of hidden_dim = 8, not 2.0$'),
    (lambda: LayerAttention(4.5, 1), '^hidden_dim .* whole number, at least 1, not 4.5$'),
    (lambda: LayerAttention('a', 1), "^hidden_dim .* whole number, at least 1, not 'a'$"),
    (lambda: Context(16, True), '^context_dim .* whole number, at least 1, not True$'),
    (lambda: Context(16, 2.5), '^context_dim .* whole number, at least 1, not 2.5$'),
])
def test_errors_name_the_bad_value_and_the_allowed_ones(build, message):
    with pytest.raises(ValueError, match=message):
        build()
