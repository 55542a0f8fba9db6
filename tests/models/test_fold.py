"""timm.models.reparameterize_model on our networks."""
import copy
import gc
import io
import pickle
import weakref
from collections import Counter

import pytest
import timm
import torch
import torch.nn as nn
from helpers import LAYOUTS, TWO_BLOCKS, VARIANTS, blocks_of, images, relative_error, tiny_model
from timm.utils import reparameterize_model

from timm_rla.layers import CONTEXTS
from timm_rla.models.fold import FoldedContext
from timm_rla.models.network import RLAResNet
from timm_rla.ops.lstm import FoldedCell


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_same_outputs(layout, variant, context):
    model = tiny_model(layout, variant, torch.float64, context=context).eval()
    x = images(layout, torch.float64, batch_size=2)
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(model)
        assert relative_error(folded(x), expected) < 1e-12
        assert relative_error(folded(x[:1]), expected[:1]) < 1e-12
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert type(folded.lstm) is FoldedCell
        for block in blocks_of(folded):
            assert type(block.context) is FoldedContext
            assert (block.context.context is None) == ('mlp' not in context)
            assert block.context.before_last_conv == (layout == 'bottleneck' and context == 'gap')
        assert torch.equal(model(x), expected)  # the network itself is as it was
        assert reparameterize_model(model, inplace=True) is model
        assert torch.equal(model(x), folded(x))


@pytest.mark.parametrize('variant', VARIANTS)
def test_same_outputs_in_single_precision(variant):
    model, x = tiny_model('bottleneck', variant).eval(), images('bottleneck')
    folded = reparameterize_model(model)
    for mode in torch.enable_grad, torch.no_grad, torch.inference_mode:
        with mode():
            assert relative_error(folded(x), model(x)) < 1e-5


@pytest.mark.parametrize('kwargs', [
    dict(stem_type='deep', stem_width=8), dict(avg_down=True), dict(output_stride=8), dict(in_chans=1),
    dict(cardinality=2, base_width=64), dict(act_layer='silu'), dict(norm_layer='groupnorm1'), dict(attn_layer='eca'),
    dict(replace_stem_pool=True), dict(drop_path_rate=0.5), dict(global_pool='max'),
], ids=str)
def test_options_of_timm(kwargs):
    model = tiny_model('bottleneck', dtype=torch.float64, **kwargs).eval()
    x = images('bottleneck', torch.float64, in_chans=kwargs.get('in_chans', 3))
    assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-12


def test_full_size_network():
    torch.manual_seed(0)
    model = timm.create_model('rla_resnet50', zero_init_last=False).eval()
    x = torch.randn(2, 3, 64, 64)
    folded = reparameterize_model(model)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) < 1e-5
    for block, planes in zip(blocks_of(folded), [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3, strict=True):
        assert block.context.linear.weight.shape == (2048, planes)


def test_features_only():
    model = tiny_model('basic', features_only=True, out_indices=(1, 3)).eval()
    x = images('basic')
    folded = reparameterize_model(model)
    assert folded.model.folded and not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for got, expected in zip(folded(x), model(x), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_without_blocks():
    """What is left when all stages are pruned has no LSTM."""
    model = tiny_model('basic').eval()
    model.prune_intermediate_layers([0])
    expected = model.forward_intermediates(images('basic'), [0], intermediates_only=True)
    folded = reparameterize_model(model)
    found = folded.forward_intermediates(images('basic'), [0], intermediates_only=True)
    assert folded.folded and type(folded.bn1) is nn.Identity and relative_error(found[0], expected[0]) < 1e-5


def test_training_mode_says_that_the_network_is_folded():
    model = tiny_model('bottleneck')
    folded = reparameterize_model(model)
    assert model.training and not folded.training  # a network in training is folded for evaluation
    with pytest.raises(RuntimeError, match='folded for inference .* cannot be trained'):
        folded.train()
    with pytest.raises(RuntimeError, match='folded'):
        nn.Sequential(folded).train()
    folded.eval()
    reparameterize_model(folded, inplace=True)  # once more changes nothing
    folded(images('bottleneck'))


def test_copies_and_pickles_fold_themselves():
    model = tiny_model('bottleneck').eval()
    x = images('bottleneck')
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model)), torch.load(
            file, weights_only=False):
        reparameterize_model(other, inplace=True)
        assert other.folded and not model.folded
        assert relative_error(other(x), model(x)) < 1e-5
    again = pickle.loads(pickle.dumps(other))  # a folded network is one, too
    assert torch.equal(again(x), other(x))


def test_a_part_is_saved_without_the_network():
    sizes = []
    for name in 'resnet20_cifar', 'rla_resnet20_cifar':
        file = io.BytesIO()
        torch.save(timm.create_model(name).layer1, file)
        sizes.append(len(file.getvalue()))
    assert sizes[1] < 1.3 * sizes[0]


def test_a_part_of_another_network_folds_with_its_new_one():
    model, other = tiny_model('bottleneck').eval(), tiny_model('bottleneck').eval()
    model.layer1 = copy.deepcopy(other.layer1)
    folded = reparameterize_model(model)
    assert folded.folded and relative_error(folded(images('bottleneck')), model(images('bottleneck'))) < 1e-5
    shallow = copy.copy(model)
    assert reparameterize_model(shallow).folded and reparameterize_model(model).folded


def test_a_network_that_calls_its_modules_in_another_order_is_not_folded():
    class Reversed(RLAResNet):
        def stem(self, x):
            return self.bn1(self.act1(self.conv1(x)))

    model = tiny_model('bottleneck').eval()
    model.__class__ = Reversed
    folded = reparameterize_model(model)
    assert torch.equal(folded(images('bottleneck')), model(images('bottleneck'))) and not folded.folded


def test_a_network_without_values_is_not_folded_and_can_be_later():
    model = tiny_model('bottleneck').eval()
    with torch.device('meta'):
        empty = tiny_model('bottleneck').eval()
    reparameterize_model(empty, inplace=True)
    empty.to_empty(device='cpu').load_state_dict(model.state_dict())
    x = images('bottleneck')
    assert torch.equal(empty(x), model(x)) and not empty.folded
    assert torch.equal(reparameterize_model(empty)(x), reparameterize_model(model)(x))
    empty.train()(x)


def test_a_network_is_freed_at_once():
    gc.disable()
    try:
        model = tiny_model('bottleneck')
        reference = weakref.ref(model)
        model = reparameterize_model(model)
        assert reference() is None
    finally:
        gc.enable()


def test_compiled():
    model = tiny_model('bottleneck', dtype=torch.float64, **TWO_BLOCKS).eval()
    x = images('bottleneck', torch.float64)
    compiled = torch.compile(reparameterize_model(model), backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-12


@pytest.mark.long
def test_onnx_export():
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    pytest.importorskip('torch', minversion='2.6', reason='export with dynamo=True needs torch 2.6 here')
    folded = reparameterize_model(tiny_model('bottleneck', **TWO_BLOCKS).eval())
    x = images('bottleneck')
    program = torch.onnx.export(
        folded, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch', min=2)},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in 2, 3, 4:
        got, = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        assert relative_error(torch.from_numpy(got), folded(x[:batch])) < 1e-5


# Modules are called, here too --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['layer2.1.conv3', 'layer2.1.bn3', 'layer1.0.bn1', 'lstm', 'layer2.1.context'])
def test_what_somebody_looks_at_is_not_folded(name):
    model = tiny_model('bottleneck', 'rla_se', torch.float64).eval()
    x, calls = images('bottleneck', torch.float64), []
    plain = model(x)
    model.get_submodule(name).register_forward_hook(lambda module, args, output: calls.append(1) or (
        tuple(1.5 * o for o in output) if isinstance(output, tuple) else 1.5 * output))
    expected = model(x)
    assert relative_error(plain, expected) > 1e-3
    before = len(calls)
    folded = reparameterize_model(model)
    calls.clear()
    assert relative_error(folded(x), expected) < 1e-12
    assert len(calls) == before > 0
    others = [block.bn2 for block in blocks_of(folded)]
    assert {type(norm) for norm in others} == {nn.Identity}  # all else is


class NormFirst(nn.Module):
    """An intra-layer attention whose modules are named in another order than they run."""

    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x * self.conv1(self.bn1(x).relu()).sigmoid()


class Adapted(nn.Sequential):
    """A convolution and what is added to its output."""

    def forward(self, x):
        return self[0](x) + self[1](x)


class Adapter(nn.Module):
    """A block of another kind."""

    def forward(self, x, state, step):
        return 2 * x, state


def doubled(output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


class Doubled(nn.Module):
    """A wrapper that changes what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return doubled(self.module(*args))


class Forward:
    """A function that replaces the `forward` of a module, and follows it into a copy."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return doubled(type(self.module).forward(self.module, *args))


def wrapped(wrapper, name):
    def change(model):
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, wrapper(model.get_submodule(name)))
    return change


def hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(
        lambda module, args, output: doubled(output))


def replaced_forward(name):
    def change(model):
        module = model.get_submodule(name)
        module.forward = Forward(module)
    return change


def identity(change):
    def change_both(model):
        model.layer2[1].bn3 = nn.Identity()
        change('layer2.1.bn3')(model)
    return change_both


def empty_first_convolution(model):
    model.layer2[1].conv1, model.layer2[1].bn1 = nn.Sequential(), nn.BatchNorm2d(64).double()
    model.layer2[1].conv2 = nn.Conv2d(64, 16, 3, padding=1).double()


@pytest.mark.parametrize('change, cell', [
    (hook('conv1'), FoldedCell), (replaced_forward('conv1'), FoldedCell),  # of the deep stem
    (wrapped(nn.Sequential, 'layer2.1.conv2'), FoldedCell),
    (lambda model: (wrapped(nn.Sequential, 'layer2.1.conv2')(model), hook('layer2.1.conv2')(model)), FoldedCell),
    (wrapped(lambda conv: Adapted(conv, nn.Conv2d(16, 16, 1).double()), 'layer2.1.conv2'), FoldedCell),
    (hook('layer2.0.downsample'), FoldedCell), (wrapped(Doubled, 'layer2.0.downsample'), FoldedCell),
    (identity(hook), FoldedCell), (identity(replaced_forward), FoldedCell), (empty_first_convolution, FoldedCell),
    (lambda model: model.layer2.append(model.layer2[1]), FoldedCell),
    (wrapped(Doubled, 'layer1'), nn.LSTMCell), (wrapped(Doubled, 'layer2'), nn.LSTMCell),
    (wrapped(Doubled, 'layer2.1'), nn.LSTMCell), (hook('layer2.1'), nn.LSTMCell),
    (replaced_forward('layer2.1'), nn.LSTMCell), (lambda model: model.layer2.append(Adapter()), nn.LSTMCell),
], ids=[
    'hook-stem', 'forward-stem', 'sequential', 'hook-sequential', 'adapted', 'hook-downsample', 'wrapped-downsample',
    'hook-identity', 'forward-identity', 'empty', 'block-twice', 'wrapped-layer1', 'wrapped-layer2', 'wrapped-block',
    'hook-block', 'forward-block', 'adapter',
])
def test_what_somebody_has_put_there_is_not_folded(change, cell):
    model = tiny_model('bottleneck', 'rla', torch.float64, stem_type='deep', stem_width=8)
    change(model)
    model.eval()
    x = images('bottleneck', torch.float64)
    expected = model(x)
    folded = reparameterize_model(model)
    assert type(folded.lstm) is cell
    assert relative_error(folded(x), expected) < 1e-12
    assert type(folded.layer3[0].bn3) is nn.Identity  # all else is
    assert (type(folded.layer3[0].context) is FoldedContext) == (cell is FoldedCell)


def test_checkpoint_wrappers():
    wrapper = pytest.importorskip('torch.distributed.algorithms._checkpoint.checkpoint_wrapper')
    for name in 'layer1', 'layer2.1', 'layer2.1.conv2', 'layer2.1.bn3', 'layer2.1.context', 'lstm':
        model = tiny_model('bottleneck', 'rla', torch.float64).eval()
        wrapped(wrapper.checkpoint_wrapper, name)(model)
        x = images('bottleneck', torch.float64)
        assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-12, name


def test_order_of_another_module_is_not_known():
    model = tiny_model('basic', dtype=torch.float64, block_args=dict(attn_layer=NormFirst)).double().eval()
    x = images('basic', torch.float64)
    assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-12


def test_all_modules_of_a_folded_network_are_called():
    folded = reparameterize_model(tiny_model('bottleneck', 'rla_se', context='gap_mlp').eval())
    counts = Counter()
    for name, module in folded.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: counts.update([name]))
    folded(images('bottleneck'))
    assert counts.pop('lstm') == 5
    unused = {name for name, _ in folded.named_modules()} - set(counts) - {'lstm'}
    assert set(counts.values()) == {1}
    assert unused == set()


def test_offloaded(tmp_path):
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    folded = reparameterize_model(tiny_model('bottleneck', 'rla_se', context='gap_mlp').eval())
    with torch.no_grad():
        expected = folded(images('bottleneck'))
        for offload in accelerate.cpu_offload, lambda model: accelerate.disk_offload(model, tmp_path):
            offloaded = copy.deepcopy(folded)
            offload(offloaded)
            assert offloaded.lstm.weight_hh.is_meta
            assert torch.equal(offloaded(images('bottleneck')), expected)
