"""The fused form of the blocks, in training, against the general form, which test_models.py holds against the paper."""
import copy
import gc

import pytest
import timm
import torch
import torch.nn as nn
from test_models import LAYOUTS, VARIANTS, images, tiny_model
from timm.layers import BlurPool2d

from timm_rla import fused
from timm_rla.kernels import cpu
from timm_rla.layers import CONTEXTS
from timm_rla.lstm import lstm_step
from timm_rla.models.blocks import RecurrentBlock

ATOL = 1e-10


@pytest.fixture
def taken(monkeypatch):
    """Counts the blocks that took the fused form."""
    count = []
    attend = RecurrentBlock.attend_fused

    def counted(self, *args):
        count.append(self)
        return attend(self, *args)

    monkeypatch.setattr(RecurrentBlock, 'attend_fused', counted)
    return count


def step(model, x, mode, steps=1, backward=True):
    """Output, gradients and buffers of a copy of a model after training steps in one of the forms."""
    fused.set_fused(mode)
    model = copy.deepcopy(model)
    for i in range(steps):
        torch.manual_seed(i)  # for drop path
        y = model(x + 0.1 * i)
        if backward:
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return dict(output=y, **gradients, **{f'buffer {name}': b for name, b in model.named_buffers()})


def assert_same(actual, expected, tol=ATOL):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            scale = max(1., value.abs().max().item())
            assert (actual[name] - value).abs().max().item() <= tol * scale, name


def assert_forms_agree(model, x, **kwargs):
    assert_same(step(model, x, 'on', **kwargs), step(model, x, 'off', **kwargs))


def set_norms(model, **attributes):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            vars(module).update(attributes)
    return model


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_both_forms_agree(layout, variant, context, taken):
    model = tiny_model(layout, variant, torch.float64, context=context)
    assert_forms_agree(model, images(layout, torch.float64), steps=2)
    assert len(taken) == 2 * sum(isinstance(module, RecurrentBlock) for module in model.modules())


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_rate=0.5),
    dict(drop_block_rate=0.2),
    dict(zero_init_last=True),
    dict(block_args=dict(attn_layer='eca')),
    dict(act_layer='silu'),
    dict(aa_layer=BlurPool2d),
], ids=str)
@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_both_forms_agree_with_options_of_timm(layout, kwargs):
    x = images(layout, torch.float64)
    if 'drop_block_rate' in kwargs:
        x = nn.functional.interpolate(x, scale_factor=3)  # timm 1.0.21 cannot drop from volumes smaller than a block
    assert_forms_agree(tiny_model(layout, dtype=torch.float64, **kwargs), x, steps=2)


def test_both_forms_agree_with_one_block_dropped_for_some_images():
    """Drop path on the attention drops what drop path on the branch drops."""
    model = tiny_model('basic', dtype=torch.float64, drop_path_rate=0.5)
    block = model.layer4[0]
    x = torch.randn(8, 32, 4, 4, dtype=torch.float64)
    context = torch.randn(8, model.lstm.input_size, dtype=torch.float64)
    state = lstm_step(context, None, model.lstm_weights(8)[0])
    for mode in 'on', 'off':
        fused.set_fused(mode)
        torch.manual_seed(0)
        keep = torch.empty(8, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5).flatten().bool()  # as timm draws
        torch.manual_seed(0)
        y, _ = block(x, state, model.lstm_weights(len(x))[0])
        shortcut = block.downsample(x).relu()
        same = (y - shortcut).abs().amax((1, 2, 3)) < 1e-12
        assert same.tolist() == (~keep).tolist() and 0 < keep.sum() < 8


@pytest.mark.parametrize('context', ['gap', 'gmp'])
def test_zero_slope_of_the_norm(context):
    """timm starts each residual branch at zero: all values tie for the maximum."""
    model = tiny_model('bottleneck', dtype=torch.float64, context=context)
    for block in model.modules():
        if isinstance(block, RecurrentBlock):
            nn.init.zeros_(block.bn3.weight[:5])
            nn.init.constant_(block.bn3.weight[5:9], -0.7)
    assert_forms_agree(model, images('bottleneck', torch.float64))


def without_running_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None)
    return model


@pytest.mark.parametrize('attributes', [dict(momentum=None), dict(momentum=0.9), dict(eps=0.3)], ids=str)
def test_both_forms_agree_on_running_statistics(attributes):
    model = set_norms(tiny_model('bottleneck', dtype=torch.float64), **attributes)
    assert_forms_agree(model, images('bottleneck', torch.float64), steps=3)


def test_both_forms_agree_without_running_statistics(taken):
    model = without_running_statistics(tiny_model('bottleneck', dtype=torch.float64))
    assert_forms_agree(model, images('bottleneck', torch.float64))
    assert_forms_agree(model.eval(), images('bottleneck', torch.float64))  # still by those of the batch
    assert len(taken) == 10


@pytest.mark.parametrize('layout', LAYOUTS)
def test_frozen_norms_take_the_general_form(layout, taken):
    model = tiny_model(layout, dtype=torch.float64)
    x = images(layout, torch.float64)
    assert_forms_agree(model.eval(), x)
    frozen = model.train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_forms_agree(frozen, x)
    assert not taken


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_both_forms_agree_in_evaluation(layout, variant, context, taken):
    model = tiny_model(layout, variant, torch.float64, context=context).eval()
    x = images(layout, torch.float64)
    expected = step(model, x, 'off', backward=False)
    with torch.no_grad():
        assert_same(step(model, x, 'on', backward=False), expected)
    with torch.inference_mode():
        assert_same(step(model, x[:, :, :32, :48], 'on', backward=False),
                    step(model, x[:, :, :32, :48], 'off', backward=False))
    assert not taken  # on a CPU, the general form takes as few passes


def test_evaluation_pools_before_a_last_1x1_convolution():
    model = tiny_model('bottleneck', dtype=torch.float64).eval()
    x = images('bottleneck', torch.float64)
    early = step(model, x, 'on')
    blocks = [module for module in model.modules() if isinstance(module, RecurrentBlock)]
    pooled = []
    for block in blocks:
        def pool(z, pool=block.context.pool):
            pooled.append(z.shape[1])
            return pool(z)
        block.context.pool = pool
    model(x)
    assert pooled == [8, 16, 16, 32, 256]  # few positions are left in the last stage: reading the weights is more
    pooled.clear()
    for block in blocks:
        block.conv3.register_forward_hook(lambda *args: None)  # somebody looks, and may change, what comes out
    model(x)
    assert pooled == [block.conv3.out_channels for block in blocks]
    assert_same(early, step(model, x, 'on'))


def test_float32_forms_agree_to_rounding(taken):
    model, x = tiny_model('bottleneck'), images('bottleneck')
    exact = step(copy.deepcopy(model).double(), x.double(), 'off')
    errors = {}
    for mode in 'on', 'off':
        got = step(model, x, mode)
        errors[mode] = max(
            ((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
            for name, value in exact.items() if value is not None
        )
    assert taken
    assert errors['on'] < max(3 * errors['off'], 1e-4), errors


def test_statistics_are_stable_far_from_zero():
    """var = E[z^2] - E[z]^2 would lose everything in float32 here."""
    z = 1e4 + torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(3)
    a = fused.fused_norm(z, norm)
    y = a.gate_and_add(torch.ones(2, 1), torch.full_like(z, 10.)) - 10
    expected = nn.BatchNorm2d(3).double()(z.double())
    assert (y - expected).abs().max() < 5e-3
    assert (norm.running_var - (0.9 + 0.1 * z.double().var((0, 2, 3)))).abs().max() < 1e-3


@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_second_derivatives(layout):
    """A gradient penalty, as differentiating through a plain ResNet allows."""
    x = images(layout, torch.float64, batch_size=2)
    gradients = []
    for mode in 'on', 'off':
        fused.set_fused(mode)
        model = tiny_model(layout, dtype=torch.float64)
        image = x.clone().requires_grad_()
        grad, = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        grad.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | dict(image=image.grad))
    assert_same(*gradients, tol=1e-8)


def test_autograd_functions_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    z, shortcut = (torch.randn(2, 3, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    gate = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, dtype=torch.float64)

    def function(z, gate, shortcut, weight, bias):
        norm._parameters.update(weight=weight, bias=bias)
        a = fused.fused_norm(z, norm)
        return a.gate_and_add(gate + a.pooled, shortcut), a.pooled, a.max_pooled()

    inputs = [t.clone().requires_grad_() for t in (z, gate, shortcut, weight, bias)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_two_backward_passes_through_parts_of_one_graph():
    """One through a part of the graph leaves nothing behind that would count twice in the next."""
    x = images('bottleneck', torch.float64)
    gradients = []
    for mode in 'on', 'off':
        fused.set_fused(mode)
        model = tiny_model('bottleneck', dtype=torch.float64)
        image = x.clone().requires_grad_()
        y = model(image).square().sum()
        first, = torch.autograd.grad(y, image, retain_graph=True)
        y.backward(retain_graph=True)
        y.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()} | dict(image=image.grad, first=first))
    assert_same(*gradients)


def test_frozen_lstm_and_backbone():
    x = images('bottleneck', torch.float64)
    model = tiny_model('bottleneck', dtype=torch.float64)
    for frozen in (r'lstm', r'layer', r'attention'):
        other = copy.deepcopy(model)
        for name, p in other.named_parameters():
            p.requires_grad = frozen not in name
        assert_forms_agree(other, x)


def test_one_value_for_each_channel():
    for mode in 'on', 'off':
        fused.set_fused(mode)
        with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
            tiny_model('bottleneck')(torch.randn(1, 3, 32, 32))


def test_hooks_see_the_last_norm(taken):
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
    expected = step(model, x, 'on')
    blocks = [module for module in model.modules() if isinstance(module, RecurrentBlock)]
    assert len(taken) == len(blocks)
    taken.clear()
    seen = []
    handles = [block.bn3.register_forward_hook(lambda m, args, out: seen.append(out)) for block in blocks]
    assert_same(step(model, x, 'on'), expected)
    assert not taken and len(seen) == len(blocks)
    for handle in handles:
        handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None):
        step(model, x, 'on')
    assert not taken
    step(model, x, 'on')
    assert len(taken) == len(blocks)


@pytest.mark.parametrize('convert', [
    lambda model: timm.layers.convert_splitbn_model(model, 2),
    lambda model: model.to(memory_format=torch.channels_last),
    lambda model: model.bfloat16(),
], ids=['split', 'channels_last', 'bfloat16'])
def test_what_else_takes_the_general_form(convert, taken):
    model = convert(tiny_model('bottleneck'))
    x = images('bottleneck').to(next(model.parameters()).dtype)
    if model.conv1.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.to(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert not taken


def test_autocast():
    """The weights of the LSTM are cast once; the gradients are those of the general form within bfloat16."""
    model, x = tiny_model('bottleneck'), images('bottleneck')
    expected = step(model, x, 'on')
    with torch.autocast('cpu', torch.bfloat16):
        got = step(model, x, 'on')
    for name in 'lstm.weight_ih', 'lstm.weight_hh', 'layer1.0.attention.fc2.weight':
        assert got[name].dtype == torch.float32
        cosine = nn.functional.cosine_similarity(got[name].flatten(), expected[name].flatten(), 0)
        assert cosine > 0.95, (name, cosine)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', ['basic', 'bottleneck'])
def test_checkpointing(layout, variant):
    model = tiny_model(layout, variant, torch.float64, context='gap_mlp')
    x = images(layout, torch.float64)
    expected = step(model, x, 'off')
    model.set_grad_checkpointing()
    got = step(model, x, 'on')
    for name in list(expected):
        if name.startswith('buffer'):  # the second forward pass counts, as in timm
            expected.pop(name), got.pop(name)
    assert_same(got, expected)


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_compiled_form(variant, context):
    model = tiny_model('bottleneck', variant, torch.float64, context=context)
    x = images('bottleneck', torch.float64)
    expected = step(model, x, 'off')
    fused.set_fused('on')
    model.compile(backend='aot_eager', fullgraph=True)
    torch.manual_seed(0)
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    got = dict(
        output=y,
        **{name: p.grad for name, p in model.named_parameters()},
        **{f'buffer {name}': b for name, b in model.named_buffers()},
    )
    assert_same(got, expected)


def test_functional_transforms_see_plain_operators(taken):
    model = without_running_statistics(tiny_model('bottleneck', dtype=torch.float64))
    x = images('bottleneck', torch.float64)
    params = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).square().sum())(params)
    assert not taken
    model(x).square().sum().backward()
    assert taken
    assert_same({name: p.grad for name, p in model.named_parameters()}, gradients)


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
    fused.set_fused('off')
    assert saved_bytes('rla_resnet50') > 1.1 * plain  # that the figure can tell


@pytest.mark.parametrize('mode', ['', 'yes', 'On'])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f'^fused form must be one of off, on, triton, not {mode!r}$'):
        fused.set_fused(mode)
    assert fused.use_fused() == 'on'


def test_cpu_passes():
    generator = torch.Generator().manual_seed(0)
    z, shortcut, grad = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mean, scale, shift = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    assert cpu.available(z) and not cpu.available(z.half()) and not cpu.available(z.transpose(2, 3))
    for got, expected in zip(cpu.statistics(z), (z.mean((2, 3)), z.var((2, 3), correction=0)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    centred = z - mean[:, :, None, None]
    out = cpu.apply(z, mean, scale, shift, shortcut)
    expected = (centred * scale[:, :, None, None] + shift[:, :, None, None] + shortcut).clamp(min=0)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    g, sum_g, sum_gz = cpu.reduce(grad, out, z, mean)
    torch.testing.assert_close(g, torch.where(out > 0, grad, 0.))
    torch.testing.assert_close(sum_g, g.sum((2, 3)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(sum_gz, (g * centred).sum((2, 3)), rtol=1e-13, atol=1e-13)
    dz = cpu.combine(g, z, mean, scale, shift, mean)
    expected = g * scale[:, :, None, None] + centred * shift[:, :, None, None] + mean[:, :, None, None]
    torch.testing.assert_close(dz, expected, rtol=1e-13, atol=1e-13)


def test_meta_device(taken):
    """A device without values, autocast and passes of its own."""
    model = tiny_model('bottleneck').to('meta')
    model(images('bottleneck').to('meta')).sum().backward()
    assert not taken and model.lstm.weight_ih.grad.shape == model.lstm.weight_ih.shape


@pytest.mark.parametrize('use', ['backward', 'forward', 'retain', 'partial'])
def test_nothing_outlives_a_step(use):
    """Neither memory nor nodes of the graph: a circle through C++ would be out of the reach of Python's collector."""
    def count():
        gc.collect()
        kinds = ('_NormalizeBackward', '_GateAndAddBackward', '_ShareBackward', '_SharedLinearBackward', '_Link')
        return sum(type(o).__name__ in kinds for o in gc.get_objects())

    model, x = tiny_model('bottleneck'), images('bottleneck').requires_grad_()
    before = count()  # what other tests hold
    for _ in range(3):
        y = model(x).sum()
        if use == 'backward':
            y.backward()
        elif use == 'retain':
            y.backward(retain_graph=True)
        elif use == 'partial':
            torch.autograd.grad(y, x, retain_graph=True)
        del y
        model.zero_grad()
        x.grad = None
    assert count() <= before


def test_a_batch_of_gradients_in_one_backward_pass():
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64).requires_grad_()
    y = model(x).sum(0)
    rows = torch.eye(len(y), dtype=y.dtype)
    batched, = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    for row, got in zip(rows, batched, strict=True):
        expected, = torch.autograd.grad(y, x, row, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_reentrant_checkpointing_is_not_taken_up(monkeypatch):
    """It would cut the recurrence at each block, since it passes no gradient through tuples."""
    monkeypatch.setattr(timm.layers.config, '_USE_REENTRANT_CKPT', True)
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
    expected = step(model, x, 'off')['lstm.weight_hh']
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model, x, 'on')['lstm.weight_hh'], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('context', ['gap', 'gmp', 'gap_mlp'])
def test_compiled_in_bfloat16(context):
    model = tiny_model('bottleneck', context=context).bfloat16()
    model.compile(backend='aot_eager', fullgraph=True)
    model(images('bottleneck', torch.bfloat16)).sum().backward()
    assert model.lstm.weight_ih.grad.isfinite().all()


def test_running_statistics_may_be_switched_off_for_a_while():
    model, x = tiny_model('bottleneck', dtype=torch.float64), images('bottleneck', torch.float64)
    set_norms(model, track_running_stats=False)
    assert_forms_agree(model, x)
