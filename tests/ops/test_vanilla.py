"""When a fast form may take over a module: a table of what is vanilla and what is not."""
import pytest
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.prune as prune
from helpers import randn
from timm.layers import DropPath, SEModule, SplitBatchNorm2d
from torch.nn.modules import module as global_hooks

from timm_rla.ops.vanilla import is_vanilla

MAKE = {
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(4),
    nn.Conv2d: lambda: nn.Conv2d(3, 4, 1, bias=False),
    nn.Identity: nn.Identity,
    nn.LSTMCell: lambda: nn.LSTMCell(3, 4),
    nn.ReLU: lambda: nn.ReLU(inplace=True),
    nn.Sequential: lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
    nn.SyncBatchNorm: lambda: nn.SyncBatchNorm(4),
    DropPath: lambda: DropPath(0.1),
    SEModule: lambda: SEModule(16),
    nn.Linear: lambda: nn.Linear(3, 4),  # no fast form asks for it today
}


def conv():
    return nn.Conv2d(3, 4, 1)


def changed(module, change):
    change(module)
    return module


@pytest.mark.parametrize('kind', MAKE, ids=lambda kind: kind.__name__)
def test_fresh_module_is_vanilla(kind):
    module = MAKE[kind]()
    assert is_vanilla(module, kind)
    assert is_vanilla(module.eval(), kind)
    assert is_vanilla(module.double(), kind)
    assert not is_vanilla(module, nn.Module)
    assert not any(is_vanilla(module, other) for other in MAKE if other is not kind)


def test_submodules_are_not_looked_at():
    module = SEModule(16)
    module.fc1.register_forward_hook(lambda *_: None)
    assert is_vanilla(module, SEModule)


@pytest.mark.parametrize('change', [
    lambda m: m.requires_grad_(False),
    lambda m: m.register_buffer('extra', torch.zeros(1)),
    lambda m: setattr(m, 'note', 'text'),
    lambda m: m.weight.data.zero_(),
    lambda m: setattr(m, 'weight', nn.Parameter(torch.zeros(4, 3, 1, 1))),
    lambda m: m.register_forward_hook(lambda *_: None).remove(),
    lambda m: m.load_state_dict(conv().state_dict()),
    lambda m: m.register_state_dict_pre_hook(lambda *_: None),  # saving is no call
    lambda m: m.weight.register_hook(lambda grad: None),  # autograd's business, whoever uses the weight
    lambda m: setattr(m, 'extra', torch.zeros(1)),  # takes no part in a call
], ids=[
    'frozen', 'buffer', 'attribute', 'data', 'parameter', 'removed_hook', 'loaded', 'state_dict_hook', 'tensor_hook',
    'extra_tensor',
])
def test_still_vanilla(change):
    assert is_vanilla(changed(conv(), change), nn.Conv2d)


class Subclass(nn.Conv2d):
    pass


class TensorSubclass(torch.Tensor):
    pass


def replace_by_tensor(module):
    weight = module.weight.detach()
    del module.weight
    module.weight = weight


def weight_as_subclass(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(TensorSubclass))


@pytest.mark.parametrize('make', [
    lambda: Subclass(3, 4, 1),
    lambda: SplitBatchNorm2d(4, num_splits=2),
    lambda: nn.ReLU6(),
    lambda: conv().to('meta'),
    lambda: changed(conv(), lambda m: m.register_forward_hook(lambda *_: None)),
    lambda: changed(conv(), lambda m: m.register_forward_pre_hook(lambda *_: None)),
    lambda: changed(conv(), lambda m: m.register_full_backward_hook(lambda *_: None)),
    lambda: changed(conv(), lambda m: m.register_full_backward_pre_hook(lambda *_: None)),
    lambda: changed(conv(), lambda m: setattr(m, 'forward', m.forward)),
    lambda: changed(conv(), lambda m: setattr(m, '_conv_forward', m._conv_forward)),
    lambda: changed(conv(), lambda m: setattr(m, '_call_impl', m._call_impl)),
    lambda: changed(conv(), lambda m: setattr(m, '__class__', Subclass)),
    lambda: changed(conv(), replace_by_tensor),
    lambda: changed(conv(), weight_as_subclass),
    lambda: prune.l1_unstructured(conv(), 'weight', 0.5),
    lambda: parametrizations.weight_norm(conv()),
    lambda: parametrizations.spectral_norm(conv()),
    pytest.param(lambda: nn.utils.weight_norm(conv()), marks=pytest.mark.filterwarnings('ignore::FutureWarning')),
], ids=[
    'subclass', 'other_norm', 'other', 'meta', 'hook', 'pre_hook', 'backward_hook', 'backward_pre_hook', 'forward',
    'method', 'call', 'class', 'tensor', 'tensor_subclass', 'pruned', 'weight_norm', 'spectral_norm',
    'old_weight_norm',
])
def test_not_vanilla(make):
    module = make()
    assert not any(is_vanilla(module, kind) for kind in MAKE)


def test_functional_call_puts_tensors_in_the_place_of_parameters():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self):
            tensors = (nn.Parameter, torch.Tensor)
            seen.append((is_vanilla(self.conv, nn.Conv2d), is_vanilla(self.conv, nn.Conv2d, tensors)))

    spy = Spy()
    spy()
    torch.func.functional_call(spy, {'conv.weight': torch.zeros(4, 3, 1, 1)}, ())
    torch.func.functional_call(spy, {'conv.weight': nn.Parameter(torch.zeros(4, 3, 1, 1))}, ())
    spy()
    assert seen == [(True, True), (False, True), (True, True), (True, True)]


@pytest.mark.parametrize('register', [
    'register_module_forward_hook', 'register_module_forward_pre_hook', 'register_module_full_backward_hook',
    'register_module_full_backward_pre_hook',
])
def test_global_hooks(register):
    module = conv()
    handle = getattr(global_hooks, register)(lambda *_: None)
    try:
        assert not is_vanilla(module, nn.Conv2d)
    finally:
        handle.remove()
    assert is_vanilla(module, nn.Conv2d)


@pytest.mark.parametrize('owner, name', [
    (nn.Conv2d, 'forward'), (nn.Conv2d, '__call__'), (nn.Conv2d, '_call_impl'), (nn.Module, '__call__'),
    (nn.Module, '_call_impl'),
])
def test_methods_replaced_on_the_class(owner, name, monkeypatch):
    module = conv()
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert not is_vanilla(module, nn.Conv2d)
    assert module(randn(1, 3, 2, 2, dtype=torch.float32)).shape == (1, 4, 2, 2)
    monkeypatch.undo()
    assert is_vanilla(module, nn.Conv2d)


@pytest.mark.parametrize('kind', [kind for kind in MAKE if kind is not nn.Linear], ids=lambda kind: kind.__name__)
def test_forward_replaced_on_the_class(kind, monkeypatch):
    module = MAKE[kind]()
    original = kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, *args: original(self, *args))
    assert not is_vanilla(module, kind)
