"""The road that most users take, all of it together: compiled by inductor, autocast to bfloat16, channels_last.

Inductor is the slowest part of these tests, so that networks are as small as they can be: two blocks.
"""
import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import TWO_BLOCKS, VARIANTS, assert_same, blocks_of, images, randn, relative_error, tiny_model

from timm_rla.ops.gated_norm import set_form

pytestmark = [pytest.mark.long, pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in ('g++', 'clang++')), reason='inductor needs a C++ compiler')]

LAYOUTS = {'rla': 'bottleneck', 'rla_se': 'basic', 'rla_vector': 'basic'}
LABELS = torch.tensor([0, 3, 6, 3])
STEPS = 6


def losses_of(model, x, steps=STEPS):
    """Losses of some steps on one batch, and the gradients of the first."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), LABELS)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name.removeprefix('_orig_mod.'): p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return torch.tensor(losses), gradients


def norm_of_difference(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('variant', VARIANTS)
def test_main_road(variant):
    layout = LAYOUTS[variant]
    model = tiny_model(layout, variant, **{**TWO_BLOCKS, 'channels': (64 if layout == 'basic' else 16,) * 4})
    for block in blocks_of(model):
        torch.nn.init.ones_(block.attention.fc1.bias)  # keeps its ReLU alive, which may be the only one
    x, other = images(layout), randn(4, 3, 64, 96, seed=5, dtype=torch.float32)
    exact, modules = copy.deepcopy(model), copy.deepcopy(model)
    model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)

    # Training. How far autocast alone takes a network from single precision, the modules show
    with torch.autocast('cpu', torch.bfloat16):
        losses, gradients = losses_of(compiled, x.contiguous(memory_format=torch.channels_last))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    set_form('off')
    expected, expected_gradients = losses_of(exact, x)
    with torch.autocast('cpu', torch.bfloat16):
        _, autocast_gradients = losses_of(modules, x, steps=1)
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.)
    for name, gradient in expected_gradients.items():
        by_modules = norm_of_difference(autocast_gradients[name], gradient)
        assert norm_of_difference(gradients[name], gradient) < max(1.5 * by_modules, 0.02) < 0.4, name
    for (name, found), wanted in zip(model.named_buffers(), exact.buffers(), strict=True):
        if found.is_floating_point():
            assert relative_error(found, wanted) < 0.05, name
        else:
            assert found == STEPS

    # Evaluation of what was trained
    exact.load_state_dict(model.state_dict())
    model.eval(), exact.eval()
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            y = compiled(other.contiguous(memory_format=torch.channels_last))
        assert y.dtype == torch.bfloat16
        assert_same(y.float(), exact(other), 0.01)
