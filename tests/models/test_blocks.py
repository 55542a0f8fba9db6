"""The forms of a block: which one runs when, and that fused and general form agree where both can run.

test_network.py holds the form that runs by default against the paper, tests/ops/ the parts of the fused one.
"""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import LAYOUTS, TWO_BLOCKS, VARIANTS, assert_same, blocks_of, images, randn, tiny_model
from timm.layers import BlurPool2d, convert_splitbn_model
from timm.utils import reparameterize_model
from torch.overrides import BaseTorchFunctionMode

from timm_rla.models import network
from timm_rla.models.blocks import RecurrentBlock
from timm_rla.ops.gated_norm import set_form
from timm_rla.ops.lstm import CellWeights

TOL = 1e-10


@pytest.fixture
def taken(monkeypatch):
    """The blocks that took the fused form."""
    blocks = []
    attend = RecurrentBlock.attend_fused

    def counted(self, *args):
        blocks.append(self)
        return attend(self, *args)

    monkeypatch.setattr(RecurrentBlock, 'attend_fused', counted)
    return blocks


def train_step(model, x, form, steps=1):
    """Output, gradients and buffers of a copy of a model after training steps in one of the forms."""
    set_form(form)
    model = copy.deepcopy(model)
    for i in range(steps):
        torch.manual_seed(i)  # for drop path
        y = model(x + 0.1 * i)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return results_of(model, y)


def results_of(model, y):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return dict(output=y, **gradients, **{f'buffer {name}': b for name, b in model.named_buffers()})


def assert_forms_agree(model, x, **kwargs):
    assert_same(train_step(model, x, 'on', **kwargs), train_step(model, x, 'off', **kwargs), TOL)


def without_running_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None)
    return model


# Which form runs ---------------------------------------------------------------------------------------------------

@pytest.fixture
def steps_taken_by(monkeypatch):
    """For each forward pass the module that took the steps of the LSTM, 'formula' or 'gate by gate'."""
    found = []
    step_function = network.step_function

    def observed(cell):
        step = step_function(cell)
        found.append(step if isinstance(step, nn.Module) else 'gate by gate' if step.by_gate else 'formula')
        return step

    monkeypatch.setattr(network, 'step_function', observed)
    return found


def autocast(model, x):
    with torch.autocast('cpu', torch.bfloat16):
        return model(x)


def forward_ad(model, x):
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(x, x))


def compiled(model, x):
    return torch.compile(model, backend='eager', fullgraph=True)(x)


def default_device(model, x):
    with torch.device('cpu'):
        return model(x)


def function_mode(model, x):
    with BaseTorchFunctionMode():
        return model(x)


def last_norms_frozen(model, x):
    for block in blocks_of(model):
        block.bn3.eval()
    return model(x)


def call_under(**kwargs):
    def call(model, x):
        model, x = model.to(**kwargs), x.to(**kwargs)
        return model(x)
    return call


@pytest.mark.filterwarnings('ignore:.torch.jit')
@pytest.mark.parametrize('training, call, blocks, lstm', [
    (True, lambda model, x: model(x), 5, 'gate by gate'),
    (True, autocast, 0, 'module'),
    (True, call_under(memory_format=torch.channels_last), 0, 'gate by gate'),
    (True, call_under(dtype=torch.bfloat16), 0, 'gate by gate'),
    (True, call_under(device='meta'), 0, 'module'),
    (True, lambda model, x: convert_splitbn_model(model, 2)(x), 0, 'gate by gate'),
    (True, last_norms_frozen, 0, 'gate by gate'),
    (True, default_device, 5, 'gate by gate'),
    (True, function_mode, 0, 'module'),
    (True, compiled, 5, 'formula'),
    (False, lambda model, x: model(x), 0, 'gate by gate'),
    (False, lambda model, x: without_running_statistics(model)(x), 5, 'gate by gate'),
    (False, autocast, 0, 'module'),
    (False, compiled, 0, 'formula'),
    (False, lambda model, x: torch.export.export(model, (x,), strict=False), 0, 'module'),
    (False, lambda model, x: torch.jit.trace(model, x, check_trace=False), 0, 'module'),
    (False, lambda model, x: torch.vmap(model)(x[None]), 0, 'formula'),
    (False, forward_ad, 0, 'module'),
], ids=[
    'train', 'train-autocast', 'train-channels_last', 'train-bfloat16', 'train-meta', 'train-split', 'train-frozen',
    'train-default_device', 'train-function_mode', 'train-compiled', 'eval', 'eval-batch_statistics', 'eval-autocast',
    'eval-compiled', 'eval-exported', 'eval-traced', 'eval-vmap', 'eval-forward_ad',
])
def test_which_form_runs(training, call, blocks, lstm, taken, steps_taken_by):
    """docs/design.md has the table."""
    model = tiny_model('bottleneck').train(training)
    call(model, images('bottleneck'))
    assert len(taken) == blocks
    assert lstm != 'module' or model.lstm in steps_taken_by  # torch.export of torch 2.5 runs a copy, too
    assert {'module' if isinstance(step, nn.LSTMCell) else step for step in steps_taken_by} == {lstm}


def test_folded_network_calls_its_cell(taken, steps_taken_by):
    folded = reparameterize_model(tiny_model('bottleneck').eval())
    folded(images('bottleneck'))
    assert steps_taken_by == [folded.lstm] and not taken


def test_hooks_take_the_general_form_as_long_as_they_are_there(taken):
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
    expected = train_step(model, x, 'on')
    assert len(taken) == 5
    taken.clear()
    handles = [block.bn3.register_forward_hook(lambda *_: None) for block in blocks_of(model)]
    assert_same(train_step(model, x, 'on'), expected, TOL)
    assert not taken
    for handle in handles[1:]:
        handle.remove()
    assert_same(train_step(model, x, 'on'), expected, TOL)
    assert len(taken) == 4
    handles[0].remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        train_step(model, x, 'on')
    assert len(taken) == 4
    train_step(model, x, 'on')
    assert len(taken) == 9


def pooled_channels(model, x):
    """Channels of what the compiled contexts are pooled from, the classifier's pooling apart."""
    channels = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == 'call_method' and node.target == 'mean' and node.args[1:] == ((2, 3),):
                channels.append(node.args[0].meta['example_value'].shape[1])
        return graph

    torch.compile(model, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    return channels


def test_compiled_evaluation_pools_before_a_last_1x1_convolution():
    def tiny(**kwargs):
        return tiny_model('bottleneck', **TWO_BLOCKS, **kwargs).eval()

    x, model = images('bottleneck'), tiny()
    assert pooled_channels(model, x) == [8, 8]
    handle = model.layer1[0].conv3.register_forward_hook(lambda *_: None)  # sees, and may change, what comes out
    assert pooled_channels(model, x) == [32, 8]
    handle.remove()
    model.layer1[1].bn3.forward = model.layer1[1].bn3.forward
    assert pooled_channels(model, x) == [8, 32]
    assert pooled_channels(without_running_statistics(tiny()), x) == []  # the gated norm has the means
    assert pooled_channels(tiny(context='gmp'), x) == []


def test_compiled_evaluation_equals_the_modules():
    """Contexts apart from 'gap', which test_capabilities.py compiles."""
    x = images('bottleneck', torch.float64)
    for context in 'gap_mlp', 'gmp':
        model = tiny_model('bottleneck', dtype=torch.float64, context=context, **TWO_BLOCKS).eval()
        with torch.no_grad():
            assert_same(compiled(model, x), model(x), 1e-12)


# Fused and general form agree --------------------------------------------------------------------------------------

@pytest.mark.parametrize('layout, variant, context', [
    *((layout, variant, 'gap') for layout in LAYOUTS for variant in VARIANTS),
    *(('bottleneck', 'rla_se', context) for context in ('gmp', 'gap_mlp', 'gmp_mlp')),
])
def test_forms_agree(layout, variant, context, taken):
    model = tiny_model(layout, variant, torch.float64, context=context)
    assert_forms_agree(model, images(layout, torch.float64), steps=2)
    assert len(taken) == 2 * len(blocks_of(model))


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_rate=0.5),
    dict(drop_block_rate=0.2, output_stride=8),  # timm 1.0.21 cannot drop from maps smaller than a block
    dict(zero_init_last=True),
    dict(block_args=dict(attn_layer='eca')),
    dict(act_layer='silu'),
    dict(aa_layer=BlurPool2d),
], ids=str)
@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_forms_agree_with_options_of_timm(layout, kwargs):
    assert_forms_agree(tiny_model(layout, dtype=torch.float64, **kwargs), images(layout, torch.float64), steps=2)


@pytest.mark.parametrize('form', ['on', 'off'])
def test_drop_path_drops_the_branch_of_some_images(form):
    """Drop path on the gate drops what drop path on the branch drops."""
    set_form(form)
    model = tiny_model('basic', dtype=torch.float64, drop_path_rate=0.5)
    block, step = model.layer4[0], model.step()
    x = randn(8, 32, 4, 4)
    state = step(randn(8, model.lstm.input_size, seed=1), None)
    torch.manual_seed(0)
    keep = torch.empty(8, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5).flatten().bool()  # as timm draws
    torch.manual_seed(0)
    y, _ = block(x, state, step)
    shortcut = block.downsample(x).relu()
    same = (y - shortcut).abs().amax((1, 2, 3)) < 1e-12
    assert same.tolist() == (~keep).tolist() and 0 < keep.sum() < 8


def test_forms_agree_without_running_statistics(taken):
    model = without_running_statistics(tiny_model('bottleneck', dtype=torch.float64))
    assert_forms_agree(model, images('bottleneck', torch.float64))
    assert_forms_agree(model.eval(), images('bottleneck', torch.float64))  # still by those of the batch
    assert len(taken) == 10


@pytest.mark.parametrize('missing', ['weight', 'bias'])
def test_norms_without_weight_or_bias_take_the_general_form(missing, taken):
    model, x = tiny_model('bottleneck', dtype=torch.float64, **TWO_BLOCKS), images('bottleneck', torch.float64)
    expected = copy.deepcopy(model)
    for block, plain in zip(blocks_of(model), blocks_of(expected), strict=True):
        setattr(block.bn3, missing, None)
        nn.init.constant_(getattr(plain.bn3, missing), missing == 'weight')
    assert_same(model(x), expected(x), TOL)
    assert taken == blocks_of(expected)
    model.compile(backend='eager', fullgraph=True)
    assert_same(model(x), expected(x), TOL)


@pytest.mark.parametrize('frozen', [r'lstm', r'layer', r'attention'])
def test_forms_agree_on_frozen_parts(frozen):
    model = tiny_model('bottleneck', dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad = frozen not in name
    assert_forms_agree(model, images('bottleneck', torch.float64))


def test_forms_agree_to_rounding_in_single_precision(taken):
    model, x = tiny_model('bottleneck'), images('bottleneck')
    exact = train_step(copy.deepcopy(model).double(), x.double(), 'off')
    errors = {}
    for form in 'on', 'off':
        got = train_step(model, x, form)
        errors[form] = max(
            ((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
            for name, value in exact.items() if value is not None
        )
    assert taken
    assert errors['on'] < max(3 * errors['off'], 1e-4), errors


@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_second_derivatives(layout):
    """A gradient penalty, as differentiating through a plain ResNet allows."""
    x = images(layout, torch.float64, batch_size=2)
    gradients = []
    for form in 'on', 'off':
        set_form(form)
        model = tiny_model(layout, dtype=torch.float64)
        image = x.clone().requires_grad_()
        grad, = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        grad.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | dict(image=image.grad))
    assert_same(*gradients, tol=1e-8)


def test_second_derivatives_where_only_a_shortcut_is_trained():
    found = []
    for form in 'on', 'off':
        set_form(form)
        model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
        model.requires_grad_(False)
        params = list(model.layer1[0].downsample.requires_grad_().parameters())
        y = model(x)
        first = torch.autograd.grad(y.square().sum(), params, create_graph=True)
        batched = torch.autograd.grad(y, params, randn(3, *y.shape), is_grads_batched=True, retain_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), params)
        found.append([*first, *batched, *second])
    assert_same(*found, tol=1e-8)


def test_gradient_with_a_tangent():
    found = []
    for form in 'on', 'off':
        set_form(form)
        model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
        y = model(x)
        with torch.autograd.forward_ad.dual_level():
            grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), randn(*y.shape))
            grads = torch.autograd.grad(y, list(model.parameters()), grad)
            found.append([part for grad in grads for part in torch.autograd.forward_ad.unpack_dual(grad)])
    assert_same(*found, tol=TOL)


def test_two_backward_passes_through_parts_of_one_graph():
    """One through a part of the graph leaves nothing behind that would count twice in the next."""
    x = images('bottleneck', torch.float64)
    gradients = []
    for form in 'on', 'off':
        set_form(form)
        model = tiny_model('bottleneck', dtype=torch.float64)
        image = x.clone().requires_grad_()
        y = model(image).square().sum()
        first, = torch.autograd.grad(y, image, retain_graph=True)
        y.backward(retain_graph=True)
        y.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | dict(image=image.grad, first=first))
    assert_same(*gradients, tol=TOL)


def test_a_batch_of_gradients_in_one_backward_pass():
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64).requires_grad_()
    y = model(x).sum(0)
    rows = torch.eye(len(y), dtype=y.dtype)
    batched, = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    for row, got in zip(rows, batched, strict=True):
        expected, = torch.autograd.grad(y, x, row, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_checkpointing(layout, variant):
    model = tiny_model(layout, variant, torch.float64, context='gap_mlp')
    x = images(layout, torch.float64)
    expected = train_step(model, x, 'off')
    model.set_grad_checkpointing()
    got = train_step(model, x, 'on')
    for name in list(expected):
        if name.startswith('buffer'):  # the second forward pass counts, as in timm
            expected.pop(name), got.pop(name)
    assert_same(got, expected, TOL)


def test_reentrant_checkpointing_is_not_taken_up(monkeypatch):
    """It would cut the recurrence at each block, since it passes no gradient through tuples."""
    monkeypatch.setattr(timm.layers.config, '_USE_REENTRANT_CKPT', True)
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
    expected = train_step(model, x, 'off')['lstm.weight_hh']
    model.set_grad_checkpointing()
    torch.testing.assert_close(train_step(model, x, 'on')['lstm.weight_hh'], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long(but=['rla_se*'])
@pytest.mark.parametrize('variant, context', [('rla', 'gap_mlp'), ('rla_se', 'gmp')])
def test_compiled_training_equals_the_modules(variant, context):
    """Contexts apart from 'gap', which test_capabilities.py compiles."""
    model = tiny_model('bottleneck', variant, torch.float64, context=context, **TWO_BLOCKS)
    x = images('bottleneck', torch.float64)
    expected = train_step(model, x, 'off')
    set_form('on')
    model.compile(backend='aot_eager', fullgraph=True)
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert_same(results_of(model, y), expected, TOL)


def test_compiled_training_with_norms_of_another_type():
    """What is pooled has the type of the feature map, not that of the norm."""
    model = tiny_model('bottleneck', 'rla_se', **TWO_BLOCKS).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = images('bottleneck').bfloat16()
    expected = copy.deepcopy(model)(x)
    y = torch.compile(model, backend='aot_eager', fullgraph=True)(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert_same(y.float(), expected.float(), 0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_blocks_compiled_one_by_one():
    """The step of the network, which eager mode made, enters a compiled block as an argument."""
    model, x = tiny_model('bottleneck', 'rla_se', torch.float64), images('bottleneck', torch.float64)
    expected = train_step(model, x, 'off')
    set_form('on')
    for block in blocks_of(model):
        block.compile(backend='eager', fullgraph=True)
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert_same(results_of(model, y), expected, TOL)


def test_compiled_in_bfloat16():
    model = tiny_model('bottleneck', context='gmp', **TWO_BLOCKS).bfloat16()
    compiled(model, images('bottleneck', torch.bfloat16)).sum().backward()
    assert model.lstm.weight_ih.grad.isfinite().all()


def test_functional_transforms_see_plain_operators(taken):
    model = without_running_statistics(tiny_model('bottleneck', dtype=torch.float64))
    x = images('bottleneck', torch.float64)
    params = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).square().sum())(params)
    assert not taken
    model(x).square().sum().backward()
    assert taken
    assert_same({name: p.grad for name, p in model.named_parameters()}, gradients, TOL)


@pytest.mark.parametrize('form', ['on', 'off'])
def test_one_value_for_each_channel(form):
    set_form(form)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        tiny_model('bottleneck')(torch.randn(1, 3, 32, 32))


def test_gradients_on_the_meta_device():
    """A device without values, autocast and passes of its own."""
    model = tiny_model('bottleneck').to('meta')
    model(images('bottleneck').to('meta')).sum().backward()
    assert model.lstm.weight_ih.grad.shape == model.lstm.weight_ih.shape


def saved_bytes(name, **kwargs):
    """What a training step keeps for its backward pass, parameters apart, each storage once."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return t.detach()  # t itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(2, 3, 128, 128))
    assert y.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def test_training_keeps_little_more_than_the_plain_network():
    plain, se, rla = (saved_bytes(name) for name in ('resnet50', 'seresnet50', 'rla_resnet50'))
    assert rla <= 1.02 * plain
    assert rla < se
    set_form('off')
    assert saved_bytes('rla_resnet50') > 1.1 * plain  # that the figure can tell


# Steps that the network does not take itself -----------------------------------------------------------------------

def test_any_step_will_do():
    """A block takes whatever is called like an LSTM cell, and its state is a plain tuple."""
    model = tiny_model('bottleneck', dtype=torch.float64).eval()
    x = randn(2, 64, 8, 8)
    found = []
    for step in model.lstm, CellWeights(
            model.lstm.weight_ih, model.lstm.weight_hh, model.lstm.bias_ih + model.lstm.bias_hh):
        y, state = model.layer1[0](x, None, step)
        y, state = model.layer2(y, state, step)
        assert type(state) is tuple and [s.shape for s in state] == [(2, 16)] * 2
        found.append([y, *state])
    assert_same(*found, tol=1e-12)
