"""Modules are used by calling them: whoever wraps, patches, hooks, prunes or offloads one finds what timm's ResNet has.

A fast form takes over a module only where nobody can notice. The networks of timm set the standard.
"""
import copy
import re
from collections import Counter, defaultdict
from functools import partial
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.prune as prune
from helpers import assert_same, blocks_of, gradients, images, is_extra, randn, randomise, relative_error
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

SMALL = dict(layers=(1, 2, 0, 0), channels=(8, 16, 16, 16), num_classes=7, drop_path_rate=0.2)
PAIRS = {'rla_resnet18': 'resnet18', 'rla_resnet50': 'resnet50', 'rla_seresnet50': 'seresnet50'}  # ours and timm's
MODES = {  # training, with gradients
    'training': (True, torch.enable_grad),
    'training-no_grad': (True, torch.no_grad),
    'evaluation': (False, torch.enable_grad),
    'evaluation-no_grad': (False, torch.no_grad),
    'evaluation-inference_mode': (False, torch.inference_mode),
}
X = images(batch_size=3, size=(32, 48))


def create(name, **kwargs):
    torch.manual_seed(0)
    recurrent = dict(hidden_dim=8, reduction=2, context_dim=16) if name.startswith('rla_') else {}
    model = randomise(timm.create_model(name, **{**SMALL, **recurrent, **kwargs}))
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which full backward hooks do not allow, here as in timm
    return model


@pytest.fixture(params=PAIRS)
def name(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def run(model, mode, x=X):
    training, gradients = MODES[mode]
    torch.manual_seed(0)  # for drop path
    with gradients():
        return model.train(training)(x)


def groups_of(model):
    """Names of all modules, those with the same name in a stage or block together: bn2 of all blocks, and so on."""
    groups = defaultdict(list)
    for name, _ in model.named_modules():
        if name:
            groups[re.sub(r'^layer\d(\.\d)?\.?', lambda m: '' if m[1] else 'stage', name) or 'block'].append(name)
    return groups


def test_groups():
    groups = groups_of(create('seresnet50'))
    assert set(groups) > {
        'conv1', 'bn1', 'act1', 'conv2', 'conv3', 'bn3', 'act3', 'se', 'se.fc1', 'se.gate', 'drop_path', 'downsample',
        'downsample.0', 'downsample.1', 'block', 'stage', 'maxpool', 'global_pool', 'fc'}
    assert groups['bn3'] == ['layer1.0.bn3', 'layer2.0.bn3', 'layer2.1.bn3']
    assert groups['conv1'][0] == 'conv1' and groups['stage'] == ['layer1', 'layer2', 'layer3', 'layer4']


# How often a module is called, and that its output counts ----------------------------------------------------------

def scaled(output):
    return tuple(map(scaled, output)) if isinstance(output, tuple) else 1.5 * output


def replace_forward(module, note):
    """As accelerate does, and many a notebook."""
    forward = module.forward

    def counted(*args, **kwargs):
        note()
        return scaled(forward(*args, **kwargs))

    module.forward = counted
    return lambda: delattr(module, 'forward')


OBSERVERS = {  # each returns what ends the observation
    'forward': replace_forward,
    'forward_hook': lambda module, note: module.register_forward_hook(
        lambda module, args, output: note() or scaled(output)).remove,
    'forward_pre_hook': lambda module, note: module.register_forward_pre_hook(lambda module, args: note()).remove,
    'full_backward_hook': lambda module, note: module.register_full_backward_hook(
        lambda module, grad_input, grad_output: note()).remove,
    'full_backward_pre_hook': lambda module, note: module.register_full_backward_pre_hook(
        lambda module, grad_output: note()).remove,
}


def calls_of(model, names, mode, observer):
    """How often modules are called if somebody observes them and no others; the output of the network."""
    counts = Counter()
    ends = [
        OBSERVERS[observer](model.get_submodule(name), lambda name=name: counts.update([name])) for name in names]
    y = run(model, mode)
    if 'backward' in observer:
        y.sum().backward()
    for end in ends:
        end()
    return counts, y


@pytest.mark.filterwarnings('ignore:Full backward hook')  # the images need no gradient
@pytest.mark.parametrize('mode, observer', [
    *((mode, 'forward') for mode in MODES),
    *((mode, hook) for mode in ('training', 'evaluation-no_grad') for hook in ('forward_hook', 'forward_pre_hook')),
    ('training', 'full_backward_hook'), ('training', 'full_backward_pre_hook'), ('evaluation', 'full_backward_hook'),
])
def test_modules_are_called_as_often_as_in_timms_network(name, mode, observer):
    ours, theirs = create(name), create(PAIRS[name])
    # timm's blocks add in place, which fails behind a backward hook: the standard are its calls
    expected, _ = calls_of(theirs, [n for n, _ in theirs.named_modules() if n], mode, 'forward_pre_hook')
    assert expected.total() > 0.9 * len(list(theirs.modules()))
    for group, names in groups_of(theirs).items():
        counts, _ = calls_of(ours, names, mode, observer)
        assert counts == {n: expected[n] for n in names if expected[n]}, group
    assert calls_of(ours, ['lstm'], mode, observer)[0] == {'lstm': len(blocks_of(ours))}
    for group, names in groups_of(ours).items():
        if group in ('attention', 'context'):
            assert calls_of(ours, names, mode, observer)[0] == dict.fromkeys(names, 1)


class Scaled(nn.Module):
    """What a replaced `forward` makes of a module, written as a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return scaled(self.module(*args))


def replaced_by_modules(model, names):
    model = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition('.')
        parent = model.get_submodule(parent)
        parent._modules[child] = Scaled(parent._modules[child])
    return model


@pytest.mark.long(but=['*-training', '*-evaluation-no_grad'])
def test_what_a_replaced_forward_returns_counts(name, mode):
    """The output is that of a network which has another module there, to the bit."""
    model = create(name)
    plain = run(model, mode)
    for group, names in groups_of(model).items():
        if group == 'context' or '.' in group and group.split('.')[0] in ('context', 'attention'):
            continue  # parts of the layers of this package
        _, y = calls_of(copy.deepcopy(model), names, mode, 'forward')
        assert torch.equal(y, run(replaced_by_modules(model, names), mode)), group
        assert not torch.equal(y, plain), group


@pytest.mark.parametrize('observer', ['forward', 'forward_hook'])
@pytest.mark.parametrize('training', [False, True])
def test_what_counts_in_eager_mode_counts_in_compiled_mode(training, observer):
    model = create('rla_seresnet50', drop_path_rate=0.).double().train(training)
    x = X.double()
    plain = model(x)
    for name in 'layer1.0.bn3', 'layer2.0.conv3', 'layer2.0.se', 'layer2.1.act3', 'lstm':
        OBSERVERS[observer](model.get_submodule(name), lambda: None)
    expected = model(x)
    assert relative_error(expected, plain) > 0.1
    assert_same(torch.compile(model, backend='eager', fullgraph=True)(x), expected, 1e-12)


@pytest.mark.long(but=['layer1.0.bn3', 'lstm'])
@pytest.mark.parametrize('where', ['layer1.0.bn3', 'layer2.1.act3', 'layer2.0.se', 'lstm'])
def test_forward_replaced_after_compiling_counts(where):
    pytest.importorskip('torch', minversion='2.14', reason='not every older torch guards that a method is read')
    model = create('rla_seresnet50', drop_path_rate=0.).double()
    compiled, x = torch.compile(model, backend='eager'), X.double()
    before = compiled(x)
    replace_forward(model.get_submodule(where), lambda: None)
    expected = model(x)
    assert relative_error(before, expected) > 1e-3
    assert_same(compiled(x), expected, 1e-12)


def calls_seen_by_a_global_hook(model, mode, register):
    names, seen = {module: n for n, module in model.named_modules()}, Counter()
    with getattr(global_hooks, register)(lambda module, *_: seen.update([names[module]])):
        y = run(model, mode)
        if 'backward' in register:
            y.sum().backward()
    return seen


@pytest.mark.filterwarnings('ignore:Full backward hook')  # the images need no gradient
@pytest.mark.parametrize('register', [
    'register_module_forward_hook', 'register_module_forward_pre_hook', 'register_module_full_backward_hook',
])
@pytest.mark.parametrize('mode', ['training', 'evaluation'])
def test_global_hooks_see_the_modules_that_they_see_in_timms_network(name, mode, register):
    seen = calls_seen_by_a_global_hook(create(name), mode, register)
    expected = calls_seen_by_a_global_hook(create(PAIRS[name]), mode, 'register_module_forward_hook')
    added = {n: count for n, count in seen.items() if is_extra(n + '.')}
    assert {n: count for n, count in seen.items() if n not in added} == expected
    assert added.pop('lstm') == 3
    assert len(added) == 12 and set(added.values()) == {1}  # context, head and its two layers in each block


class ScaledFunctions(TorchFunctionMode):
    """Counts functions and changes what some of them return."""

    def __init__(self, *changed):
        super().__init__()
        self.changed, self.counts = changed, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        output = function(*args, **kwargs or {})
        return scaled(output) if function in self.changed else output


def test_functions_are_called_as_often_as_in_timms_network(name, mode):
    called = []
    for model in create(name), create(PAIRS[name]):
        with ScaledFunctions() as functions:
            run(model, mode)
        called.append(functions.counts)
    ours, theirs = called
    assert theirs[nn.functional.batch_norm] > 5 and ours[torch.lstm_cell] == 3
    for function in nn.functional.batch_norm, nn.functional.conv2d, torch.conv2d:
        assert ours[function] >= theirs[function]  # SE of the attention apart
    assert ours[nn.functional.batch_norm] == theirs[nn.functional.batch_norm]


@pytest.mark.parametrize('function, kind', [
    (nn.functional.batch_norm, nn.BatchNorm2d), (torch.lstm_cell, nn.LSTMCell)])
def test_what_a_function_mode_returns_counts(name, mode, function, kind):
    model = create(name).double()
    names = [n for n, module in model.named_modules() if isinstance(module, kind)]
    with ScaledFunctions(function):
        y = run(model, mode, X.double())
    assert_same(y, run(replaced_by_modules(model, names), mode, X.double()), 1e-12)
    assert relative_error(y, run(model, mode, X.double())) > 1e-3


@pytest.mark.parametrize('function', ['batch_norm', 'relu', 'conv2d'])
def test_functions_that_somebody_has_replaced(name, mode, function, monkeypatch):
    real, counts = getattr(nn.functional, function), []
    for model in create(name), create(PAIRS[name]):
        replacement = Mock(side_effect=real)
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, function, replacement)
            run(model, mode)
        counts.append(replacement.call_count)
    assert counts[0] == counts[1] and (counts[1] > 5 or function == 'conv2d')  # which nn.Conv2d calls as F.conv2d


def test_hooks_leave_nothing_behind(name):
    model = create(name)
    expected = run(model, 'training')
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    run(model, 'training')
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model, 'training'), expected)


# Offloading --------------------------------------------------------------------------------------------------------

def lstm_called(model):
    """The network whose LSTM is called as a module, as it is when something is attached to it."""
    model = copy.deepcopy(model)
    model.lstm.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize('where', ['cpu', 'disk'])
@pytest.mark.parametrize('batch_size', [1, 3])
def test_offloaded(name, where, batch_size, tmp_path):
    """Weights that lie elsewhere until a module is called. Equal to the bit to the network that calls its LSTM, too."""
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    model = create(name).eval()
    offloaded, x = copy.deepcopy(model), X[:batch_size]
    with torch.no_grad():
        expected, by_gate = lstm_called(model)(x), model(x)
        if where == 'cpu':
            accelerate.cpu_offload(offloaded, execution_device='cpu', offload_buffers=True)
        else:
            accelerate.disk_offload(offloaded, tmp_path, execution_device='cpu', offload_buffers=True)
        assert {t.device.type for t in (*offloaded.parameters(), *offloaded.buffers())} == {'meta'}
        for _ in range(2):
            y = offloaded(x)
            assert torch.equal(y, expected)
            assert relative_error(y, by_gate) < 1e-6  # gate by gate the LSTM rounds differently


# Pruning and parametrisation ---------------------------------------------------------------------------------------

def pruned(model):
    """Weights of the LSTM, of a last convolution and of a last norm, which a fast form would take over."""
    block = model.layer2[1]
    for module in model.lstm, block.tail()[0], block.tail()[1]:
        prune.l1_unstructured(module, 'weight_ih' if module is model.lstm else 'weight', 0.4)
    return model


def test_pruned(name):
    """Trained, saved and loaded into a network that has been pruned in the same way."""
    model = pruned(create(name, drop_path_rate=0.))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(images(batch_size=4, size=(32, 48), seed=seed)).square().mean().backward()
        optimizer.step()
    names = ['lstm.weight_ih', *(f'layer2.1.{part}{3 if "50" in name else 2}.weight' for part in ('conv', 'bn'))]
    for n in names:
        module, _, weight = n.rpartition('.')
        module = model.get_submodule(module)
        mask, original = getattr(module, f'{weight}_mask'), getattr(module, f'{weight}_orig')
        change = (original - before[f'{n}_orig']).detach()
        assert 0.3 < 1 - mask.mean() < 0.5 and change[mask == 1].any() and not change[mask == 0].any()

    loaded = pruned(create(name, drop_path_rate=0.))
    loaded.load_state_dict(model.state_dict())
    model.eval(), loaded.eval()
    with torch.no_grad():
        logits = model(X)
        assert torch.equal(loaded(X), logits)
        for n in names:  # for good: the modules are plain ones again
            module, _, weight = n.rpartition('.')
            prune.remove(loaded.get_submodule(module), weight)
        assert relative_error(loaded(X), logits) < 1e-6


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.filterwarnings('ignore:.torch.nn.utils.weight_norm')
@pytest.mark.parametrize('attach, factor', [
    (lambda module, weight: parametrize.register_parametrization(module, weight, Doubled()), 2),
    (parametrizations.weight_norm, 1),
    (nn.utils.weight_norm, 1),
], ids=['doubled', 'weight_norm', 'old_weight_norm'])
@pytest.mark.parametrize('training', [False, True])
def test_parametrised(name, attach, factor, training):
    model = create(name, drop_path_rate=0.).double().train(training)
    expected = copy.deepcopy(model)
    for m in model, expected:
        block = m.layer2[1]
        for module, weight in (m.lstm, 'weight_ih'), (m.lstm, 'weight_hh'), (block.tail()[0], 'weight'), (
                block.tail()[1], 'weight'):
            if m is model:
                attach(module, weight)
            else:
                getattr(module, weight).data.mul_(factor)
    x = X.double()
    y = model(x)
    assert_same(y, expected(x), 1e-12)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Quantisation ------------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings('ignore')  # it is about to go, and says so in several ways
def test_dynamic_quantisation(name):
    if not {'x86', 'fbgemm', 'qnnpack'} & set(torch.backends.quantized.supported_engines):
        pytest.skip('this build of torch cannot quantise')
    quantization = pytest.importorskip('torch.ao.quantization', reason='torch.ao.quantization is gone')
    model = create(name).eval()
    quantised = quantization.quantize_dynamic(model, dtype=torch.qint8)
    assert type(quantised.lstm) is torch.ao.nn.quantized.dynamic.LSTMCell
    calls = []
    quantised.lstm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        y, expected = quantised(X), model(X)
    assert len(calls) == 3
    assert 0 < relative_error(y, expected) < 0.05


@pytest.mark.filterwarnings('ignore')
def test_static_quantisation(name):
    if 'x86' not in torch.backends.quantized.supported_engines:
        pytest.skip('this build of torch cannot quantise')
    quantise = pytest.importorskip('torch.ao.quantization.quantize_fx', reason='torch.ao.quantization is gone')
    model = create(name).eval()
    mapping = torch.ao.quantization.get_default_qconfig_mapping('x86')
    with torch.no_grad():
        prepared = quantise.prepare_fx(model, mapping, (X,))
        prepared(X)
        assert 0 < relative_error(quantise.convert_fx(prepared)(X), model(X)) < 0.3


# Parameters that are swapped ---------------------------------------------------------------------------------------

def changed_parameters(model, factor=1.1):
    return {name: factor * p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize('wrap', [lambda p: p, nn.Parameter], ids=['tensors', 'parameters'])
@pytest.mark.parametrize('training', [False, True])
def test_functional_call(name, training, wrap):
    model = create(name, drop_path_rate=0.).double().train(training)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(changed_parameters(model), strict=False)
    params = {name: wrap(p) for name, p in changed_parameters(model).items()}
    x = X.double()
    before = copy.deepcopy(model)(x)
    assert_same(torch.func.functional_call(model, (params, buffers), (x,)), expected(x), 1e-12)
    assert_same(buffers, dict(expected.named_buffers()), 1e-12)  # the statistics go where they are asked to go
    assert_same(model(x), before, 1e-12)


def test_ensemble_by_vmap(name):
    models = [create(name).double().eval() for _ in range(3)]
    for i, model in enumerate(models):
        model.load_state_dict(changed_parameters(model, 1 + 0.1 * i), strict=False)
    state = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to('meta')
    with torch.no_grad():
        y = torch.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (X.double(),)))(*state)
        assert_same(y, torch.stack([model(X.double()) for model in models]), 1e-12)


def test_compiled_ensemble_by_vmap(name):
    model = create(name).double().eval()
    states = [{n: t.detach() * (1 + 0.1 * i) for n, t in model.named_parameters()} for i in range(2)]
    params = {n: torch.stack([state[n] for state in states]) for n in states[0]}

    def call(params, x):
        return torch.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(params)

    with torch.no_grad():
        expected = call(params, X.double())
        assert_same(torch.compile(call, backend='eager')(params, X.double()), expected, 1e-12)


def test_gradients_of_each_image_by_vmap(name):
    model = create(name).double().eval()
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, image):
        return torch.func.functional_call(model, params, (image[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(params, X.double())
    for i, image in enumerate(X.double()):
        expected = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        assert_same([grad[i] for grad in found.values()], expected, 1e-10)


@pytest.mark.parametrize('training', [False, True])
def test_a_tensor_in_the_place_of_a_parameter(name, training):
    """As meta-learning does: the result follows, and gradients flow into what the tensor is made of."""
    model = create(name, drop_path_rate=0.).double().train(training)
    expected = copy.deepcopy(model)
    x, scales = X.double(), []
    for m in model, expected:
        block = m.layer2[1]
        places = [(m.lstm, 'weight_ih'), (m.lstm, 'bias_hh'), *((layer, 'weight') for layer in block.tail()[:2])]
        if block.se is not None:
            places.append((block.se.fc1, 'weight'))
        for module, parameter in places:
            value = getattr(module, parameter).detach()
            if m is expected:
                getattr(module, parameter).data.copy_(1.3 * value)
            else:
                scales.append(torch.tensor(1.3, dtype=torch.float64, requires_grad=True))
                delattr(module, parameter)
                setattr(module, parameter, scales[-1] * value)
    y = model(x)
    assert_same(y, expected(x), 1e-12)
    gradients = torch.autograd.grad((y * randn(*y.shape)).sum(), scales)
    assert all(grad != 0 for grad in gradients)


# Checkpointing -----------------------------------------------------------------------------------------------------

def checkpointed(model, parts, use_reentrant):
    model = copy.deepcopy(model)
    for module in parts(model):
        module.forward = partial(checkpoint, module.forward, use_reentrant=use_reentrant)
    return model


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('parts, words', [
    (blocks_of, 'use_reentrant=False keeps it'),
    (lambda m: [m.layer1, m.layer2], 'use_reentrant=False keeps it'),
    (lambda m: [m.layer1], 'use_reentrant=False keeps it'),
    (lambda m: [m.layer2], 'backward through the graph a second time'),  # torch's own words
], ids=['blocks', 'stages', 'first', 'last'])
def test_checkpointing_by_others_is_exact_or_an_error(name, parts, words, frozen):
    """The reentrant kind passes no gradient through the state: timm's networks have none."""
    model = create(name, drop_path_rate=0.).double().train()
    model.lstm.requires_grad_(not frozen)
    expected = gradients(copy.deepcopy(model), X.double())
    assert_same(gradients(checkpointed(model, parts, False), X.double()), expected, 1e-10)
    with pytest.raises(RuntimeError, match=words):
        gradients(checkpointed(model, parts, True), X.double())


def test_a_state_without_gradient_is_no_error(name):
    """Gradients with respect to a feature map, behind stages that ran without."""
    model = create(name).double().train()
    with torch.no_grad():
        step = model.step()
        z, state = model.layer1(model.maxpool(model.stem(X.double())), None, step)
    z, _ = model.layer2(z.requires_grad_(), state, model.step())
    z.sum().backward()
    assert model.lstm.weight_hh.grad.any()


# In place ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change', [
    lambda features: features.mul_(2), nn.ReLU(inplace=True), lambda features: features.detach_(),
    lambda features: features[0].zero_(),
], ids=['mul', 'relu', 'detach', 'part'])
@pytest.mark.parametrize('mode', ['training', 'training-no_grad'])
def test_features_may_be_changed_in_place(name, mode, change):
    """After the network, as in timm's, where a backward pass then says that it needed them."""
    outcomes = []
    for model in create(name), create(PAIRS[name]):
        with MODES[mode][1]():
            features = model.train().forward_features(X)
        change(features)
        try:
            features.sum().backward()
            outcomes.append(None)
        except RuntimeError as error:
            outcomes.append(re.sub(r'output 0 of \w+.*', '', str(error)))
    assert outcomes[0] == outcomes[1]
