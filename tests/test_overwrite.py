"""Evaluation that writes over its volumes, against evaluation with gradients, which needs them all."""
import itertools

import pytest
import timm
import torch
import torch.nn as nn
from test_models import LAYOUTS, VARIANTS, images, tiny_model

from timm_rla.models.overwrite import norm_over

FORMATS = (torch.contiguous_format, torch.channels_last)
# Types of volume and norm; autocast mixes them
DTYPES = ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32))


def watch_convolutions(model):
    """What each convolution returns, as it is and as it was then, by name."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and '.se.' not in name:
            def forward(x, forward=module.forward, name=name):
                out = forward(x)
                seen[name] = out, out.clone()
                return out
            module.forward = forward
    return seen


@pytest.mark.parametrize('dtype, norm_dtype', DTYPES, ids=str)
@pytest.mark.parametrize('memory_format', FORMATS, ids=str)
@pytest.mark.parametrize('affine', [True, False])
def test_norm_is_the_same_bit_for_bit(dtype, norm_dtype, memory_format, affine):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, padding=1, dtype=dtype), nn.BatchNorm2d(8, affine=affine, dtype=norm_dtype).eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 2)
    for shape in (2, 3, 7, 5), (1, 3, 1, 1), (0, 3, 4, 4):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
        with torch.no_grad():
            z = conv(x)
            expected = norm(z)
            y = norm_over(z, conv, norm)
        assert y is z
        assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_evaluation_writes_over_every_convolution(layout, variant):
    model, x = tiny_model(layout, variant).eval(), images(layout)
    seen = watch_convolutions(model)
    expected = model(x)
    assert all(torch.equal(now, then) for now, then in seen.values())
    names = set(seen)
    for guard in torch.no_grad, torch.inference_mode:
        seen.clear()
        with guard():
            torch.testing.assert_close(model(x), expected)
        assert set(seen) == names
        assert not any(torch.equal(now, then) for now, then in seen.values())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_training_writes_over_nothing(layout):
    model, x = tiny_model(layout).train(), images(layout)
    seen = watch_convolutions(model)
    with torch.no_grad():
        model(x)
    assert all(torch.equal(now, then) for now, then in seen.values())


LAST = ('conv3', 'bn3', 'se', 'downsample', 'downsample.0', 'downsample.1', 'act3')
# In a folded network ReLU goes over the output of the others, as it does in timm
CASES = [*itertools.product(LAST, [False, True]), ('conv1', False), ('conv2', False)]


@pytest.mark.parametrize('layer, folded', CASES)
def test_what_somebody_saw_is_not_overwritten(layer, folded):
    model = tiny_model('bottleneck', 'rla_se' if layer == 'se' else 'rla', torch.float64).eval()
    x = images('bottleneck', torch.float64)
    expected = model(x)
    if folded:
        model = timm.utils.reparameterize_model(model)
    seen = []
    for block in model.layer1[0], model.layer2[0]:
        block.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append((out, out.clone())))
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert len(seen) == 2
    for now, then in seen:
        assert torch.equal(now, then)
