"""Recorded layer attentions are those of the equations, whatever form the model runs in, and nothing is left behind."""
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from small_networks import TINY, build, hook_count, images
from timm.models import create_model
from timm.utils import reparameterize_model
from torch.nn.parallel import DistributedDataParallel

from timm_rla.analysis import grad_cam, normalize_attention, record_attention, stack_attention


@pytest.mark.parametrize('name', ['rla_resnet20_cifar', 'rla_vector_resnet20_cifar', 'rla_seresnet20_cifar'])
def test_recorded_attention_is_that_of_the_equations(name, monkeypatch):
    model, x = build(name, **TINY).double(), images(dtype=torch.float64)
    heads = {}

    def mlp(x, params, block, original=reference.mlp):
        heads[block] = torch.sigmoid(original(x, params, block))
        return original(x, params, block)

    monkeypatch.setattr(reference, 'mlp', mlp)
    reference.logits(model.state_dict(), x, cifar=True, se='se' in name, vector='vector' in name, **TINY)
    with record_attention(model) as attention:
        model(x)
    assert list(attention) == ['layer1.0', 'layer2.0', 'layer3.0']
    for block, a in attention.items():
        assert a.shape == (2, 1 if 'vector' not in name else {'1': 16, '2': 32, '3': 64}[block[5]])
        torch.testing.assert_close(a, heads[f'{block}.attention'], rtol=1e-10, atol=0)
    assert stack_attention(attention).shape == (2, 3)
    assert hook_count(model) == 0


@pytest.fixture(scope='module')
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp('gloo') / 'store'
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class CountingBackend:
    """Backend of torch.compile that counts how often compiled code runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)
        return run


@pytest.mark.parametrize('wrapper', ['compiled', 'compiled in place', 'compiled block', 'ddp', 'ddp of compiled'])
def test_wrapped_models(wrapper, process_group):
    torch.compiler.reset()
    model, x = build('rla_resnet20_cifar', **TINY), images()
    with record_attention(model) as expected:
        model(x)
    maps = grad_cam(model, x).maps
    backend = CountingBackend()
    wrapped = model
    if wrapper == 'compiled in place':
        model.compile(backend=backend)
    elif wrapper == 'compiled block':
        model.layer2[0] = torch.compile(model.layer2[0], backend=backend)
    elif 'compiled' in wrapper:
        wrapped = torch.compile(model, backend=backend)
    if 'ddp' in wrapper:
        wrapped = DistributedDataParallel(wrapped)

    with torch.no_grad():
        wrapped(x)
        calls = backend.calls
        assert (calls > 0) == ('compiled' in wrapper)
        with record_attention(wrapped) as attention:
            wrapped(x)
        assert list(attention) == list(expected)
        assert all(torch.equal(attention[block], expected[block]) for block in expected)
        assert backend.calls == calls
        if wrapper != 'compiled block':  # there the names of the norms change
            recorded = grad_cam(wrapped, x).maps
            assert all(torch.equal(recorded[layer], maps[layer]) for layer in maps)
        assert hook_count(wrapped) == 0
        wrapped(x)
        assert (backend.calls > calls) == ('compiled' in wrapper)  # compiled code is in use again


def test_nothing_is_left_behind_after_an_error():
    model = build('rla_resnet20_cifar', **TINY).train()
    model.layer2[0].bn1.eval()  # a part that is frozen
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), record_attention(model):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        with record_attention(model):
            model(torch.zeros(1, 5, 8, 8))
    with pytest.raises(RuntimeError):
        grad_cam(model, torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError):
        grad_cam(model, images(), target=10)
    assert hook_count(model) == 0 and [module.training for module in model.modules()] == modes


def test_only_the_last_pass_is_kept():
    model = build('rla_resnet20_cifar', **TINY)
    with record_attention(model) as attention:
        model(images())
        first = weakref.ref(attention['layer1.0'])
        model(images(batch=3))
        assert first() is None and attention['layer1.0'].shape == (3, 1)
        assert not attention['layer1.0'].requires_grad


def test_model_without_attention():
    with pytest.raises(ValueError, match='rla_'):
        with record_attention(build('resnet20_cifar', **TINY)):
            pass


def test_features_only_models_have_attention():
    model = create_model('rla_resnet20_cifar', features_only=True, **TINY)
    with record_attention(model) as attention:
        model(images())
    assert len(attention) == 3


def test_attention_in_training_and_after_folding():
    """The other forms of a block have their attention recorded alike."""
    model = build('rla_resnet20_cifar', **TINY)
    with record_attention(model) as expected:
        model(images())
    folded = reparameterize_model(model)
    with record_attention(folded) as attention:
        folded(images())
    for block in expected:
        torch.testing.assert_close(attention[block], expected[block], rtol=1e-5, atol=1e-6)

    model.train()
    x = images(batch=4)
    with record_attention(model) as attention:
        model(x)
    hook = model.layer1[0].bn2.register_forward_hook(lambda *args: None)  # which needs the general form
    with record_attention(model) as general:
        model(x)
    hook.remove()
    for block in general:
        torch.testing.assert_close(attention[block], general[block], rtol=1e-5, atol=1e-6)


def test_normalized_attention():
    a = torch.rand(5, 9, dtype=torch.float64)
    expected = (a.numpy() - a.numpy().mean(1, keepdims=True)) / a.numpy().std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(normalize_attention(a), expected)
    assert (normalize_attention(torch.full((2, 9), 0.3)) == 0).all()  # a neutral warm start



@pytest.mark.long
def test_analysis_imports_no_matplotlib():
    code = 'import sys, json, timm_rla.analysis; print(json.dumps(sorted(sys.modules)))'
    modules = json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)
    assert 'timm_rla.analysis.gradcam' in modules and 'matplotlib' not in modules
