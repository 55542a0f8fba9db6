"""Every capability that a timm model has, one test each, on the three families: RLA, IA+RLA and RLA-vector."""
import copy
import math
import pickle
from functools import partial

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn as nn
from helpers import TWO_BLOCKS, assert_same, gradients, images, is_extra, randomise
from timm.layers import SplitBatchNorm2d, convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import group_modules, group_parameters, load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3, freeze, unfreeze

from timm_rla.models.blocks import RecurrentStage

# Small, yet with a block that follows another in its stage. N is such that a context is repeated, left alone, pooled
# and averaged in groups, in this order, in the four stages.
SMALL = dict(layers=(2, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=7)
RECURRENT = dict(SMALL, hidden_dim=8, reduction=2)
FAMILIES = {
    'rla_resnet50': dict(RECURRENT, context_dim=64),
    'rla_seresnet18': dict(RECURRENT, context_dim=16),
    'rla_vector_resnet18': dict(RECURRENT, context_dim=16),
}
STAGES = ('layer1', 'layer2', 'layer3', 'layer4')
BLOCKS = [f'{stage}.{block}' for stage, blocks in zip(STAGES, SMALL['layers']) for block in range(blocks)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return create(family).eval()


def create(family, **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(family, **dict(FAMILIES[family], **kwargs)))


def plain(**kwargs):
    """timm's own model, which sets the standard."""
    return timm.create_model('resnet18', **dict(SMALL, **kwargs)).eval()


def assert_same_logits(model, expected, tol=0., **kwargs):
    with torch.no_grad():
        assert_same(model(images(**kwargs)), expected(images(**kwargs)), tol)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def wrap(model, name):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, Wrapper(model.get_submodule(name)))


def error_of(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


# Features ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (2,), (1, 3), (3, -1), (0, 1, 2, 3, 4), 2], ids=str)
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_features_only(family, output_stride, out_indices):
    full = create(family, output_stride=output_stride).eval()
    model = timm.create_model(
        family, features_only=True, out_indices=out_indices, output_stride=output_stride, **FAMILIES[family]).eval()
    assert not model.model.load_state_dict(full.state_dict(), strict=False).missing_keys

    x = images()
    features = model(x)
    indices = [i % 5 for i in out_indices] if isinstance(out_indices, tuple) else [3, 4]
    assert_same(features, full.forward_intermediates(x, indices, intermediates_only=True))
    theirs = plain(features_only=True, out_indices=out_indices, output_stride=output_stride).feature_info
    widening = full.layer1[0].expansion
    assert model.feature_info.channels() == [c * widening if i else c for i, c in zip(indices, theirs.channels())]
    assert model.feature_info.reduction() == theirs.reduction()
    assert model.feature_info.module_name() == theirs.module_name()
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [(f.shape[2], f.shape[3]) for f in features] == [(64 // r, 96 // r) for r in model.feature_info.reduction()]

    sum(f.square().mean() for f in features).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # nothing is kept for no use


def test_pruning_leaves_what_somebody_has_put_around_a_stage(model):
    model.layer1, model.layer2 = Wrapper(model.layer1), Wrapper(model.layer2)
    expected = model.forward_intermediates(images(), [1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert type(model.layer1) is Wrapper
    assert_same(model.forward_intermediates(images(), [1], intermediates_only=True), expected)


@pytest.mark.parametrize('feature_cls', ['hook', 'fx', 'List', 'getter'])
def test_features_by_other_means(family, feature_cls):
    args = dict(FAMILIES[family], zero_init_last=False)
    torch.manual_seed(0)
    features = timm.create_model(family, features_only=True, feature_cls=feature_cls, out_indices=(1, 3), **args).eval()
    torch.manual_seed(0)
    model = timm.create_model(family, **args).eval()
    assert_same(
        list(features(images())), model.forward_intermediates(images(), [1, 3], intermediates_only=True), 1e-6)


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('indices', [None, 1, 3, [0], [0, 2], [-1], [-4, 0], (4, 1)], ids=str)
def test_forward_intermediates(model, indices, norm):
    outputs = []
    for name in ('act1', *STAGES):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    x = images()
    final = model.forward_features(x)
    taken = {None: [0, 1, 2, 3, 4], 1: [4], 3: [2, 3, 4]}.get(indices) if not isinstance(indices, (list, tuple)) else (
        sorted(i % 5 for i in indices))
    expected = [outputs[i] for i in taken]  # always in the order of the network

    call = partial(model.forward_intermediates, x, indices, norm=norm, output_fmt='NCHW')
    for stop_early in (False, True):
        assert_same(call(stop_early=stop_early, intermediates_only=True), expected)
        last, intermediates = call(stop_early=stop_early)
        assert_same(intermediates, expected)
        assert_same(last, final if not stop_early else expected[-1] if taken[-1] else model.maxpool(expected[-1]))


@pytest.mark.parametrize('kwargs', [
    dict(indices=0), dict(indices=6), dict(indices=-1), dict(indices=[5]), dict(indices=[0, -6]), dict(indices=[]),
    dict(indices='layer1'), dict(output_fmt='NHWC'), dict(output_fmt='NLC'), dict(norms=True),
], ids=str)
def test_errors_of_forward_intermediates(model, kwargs):
    theirs = error_of(lambda: plain().forward_intermediates(images(batch_size=1), **kwargs))
    ours = error_of(lambda: model.forward_intermediates(images(batch_size=1), **kwargs))
    assert theirs is not None
    assert ours == (theirs[0], theirs[1].replace('ResNet.', 'RecurrentLayerAttention.'))


# Head and input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax'])
def test_forward_is_features_and_head(family, global_pool):
    model = create(family, global_pool=global_pool, drop_rate=0.5).eval()
    x = images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape == (4, model.num_features, 2, 3)
    assert pooled.shape == (4, model.num_features * model.global_pool.feat_mult())
    theirs = plain(global_pool=global_pool)
    assert model.head_hidden_size / model.num_features == theirs.head_hidden_size / theirs.num_features
    assert_same(model.forward_head(features), model(x))
    assert_same(model.fc(pooled), model(x))
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'


def test_reset_classifier(model):
    x = images()
    features = model.forward_features(x)
    pooled = features.mean((2, 3))
    model.reset_classifier(5)
    assert model(x).shape == (4, 5) and model.num_classes == 5
    model.reset_classifier(3, 'max')
    assert_same(model(x), model.fc(features.amax((2, 3))))
    model.reset_classifier(0, 'avg')
    assert_same(model(x), pooled, 1e-6)
    model.reset_classifier(0, '')
    assert_same(model(x), features)


@pytest.mark.parametrize('kwargs, shape', [
    (dict(num_classes=0), (4, 'C')), (dict(num_classes=0, global_pool=''), (4, 'C', 2, 3)),
    (dict(num_classes=1), (4, 1)),
], ids=str)
def test_without_classifier(family, kwargs, shape):
    model = create(family, **kwargs).eval()
    assert model(images()).shape == tuple(model.num_features if n == 'C' else n for n in shape)


@pytest.mark.parametrize('in_chans', [1, 3, 4, 13])
def test_in_chans(family, in_chans):
    model = create(family, in_chans=in_chans).eval()
    logits = model(images(in_chans=in_chans))
    assert logits.shape == (4, 7) and logits.std(0).min() > 0


@pytest.mark.parametrize('size', [(1, 1), (31, 33), (64, 64), (65, 127), (224, 40)], ids=str)
def test_input_size(model, size):
    features = model.forward_intermediates(images(batch_size=2, size=size), intermediates_only=True)
    expected = plain().forward_intermediates(images(batch_size=2, size=size), intermediates_only=True)
    assert [f.shape[2:] for f in features] == [f.shape[2:] for f in expected]
    assert model(images(batch_size=2, size=size)).isfinite().all()


@pytest.mark.parametrize('changes', [dict(in_chans=1, num_classes=7), dict(in_chans=5, num_classes=3)], ids=str)
def test_pretrained_weights_fit_other_heads_and_inputs(family, model, changes, tmp_path):
    """timm adapts the weights of the first convolution and leaves a classifier of another size as initialised."""
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=7)
    adapted = timm.create_model(
        family, pretrained=True, pretrained_cfg_overlay=overlay, **dict(FAMILIES[family], **changes)).eval()
    weight = model.conv1.weight
    if changes['in_chans'] == 1:
        model.conv1.weight.data = weight.sum(1, keepdim=True)
    else:
        model.conv1.weight.data = weight[:, [0, 1, 2, 0, 1]] * 3 / 5
    x = images(in_chans=changes['in_chans'])
    assert_same(adapted.forward_features(x), model.forward_features(x), 1e-5)
    if changes['num_classes'] == 7:
        assert_same(adapted(x), model(x), 1e-5)
    else:
        assert adapted(x).shape == (4, changes['num_classes'])


# Training ----------------------------------------------------------------------------------------------------------

def kept_for_backward(model, x):
    """Bytes of all activations that a forward pass leaves in memory."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # the tensors themselves too: the memory of one that is gone could be given to another

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor.detach()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    def keep_arguments(block, args):
        for tensor in (args[0], *(args[1] or ())):
            keep(tensor.detach())

    # Checkpointing keeps the arguments of what it will run again, and autograd does not get to see these.
    handles = [block.register_forward_pre_hook(keep_arguments) for stage in STAGES for block in getattr(model, stage)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    for handle in handles:
        handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_grad_checkpointing_saves_memory(family):
    # At full depth, else the stem takes most of the memory
    model, x = timm.create_model(family).train(), images(batch_size=2)
    everything = kept_for_backward(model, x)
    model.set_grad_checkpointing()
    assert kept_for_backward(model, x) < (0.36 if 'resnet50' in family else 0.55) * everything
    model.set_grad_checkpointing(False)
    assert kept_for_backward(model, x) == everything


def test_grad_checkpointing_of_features(family):
    model = timm.create_model(family, features_only=True, **FAMILIES[family]).double().train()
    theirs = plain(features_only=True)
    found, calls = [], []
    model.model.layer1[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable), theirs.set_grad_checkpointing(enable)
        assert model.grad_checkpointing == theirs.grad_checkpointing == enable
        calls.clear()
        model.zero_grad()
        sum(features.square().mean() for features in model(images().double())).backward()
        assert len(calls) == 1 + enable  # the block runs again in the backward pass
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_same(*found, 1e-12)


@pytest.mark.parametrize('where', ['layer1', 'layer1.1'])
def test_grad_checkpointing_below_a_wrapper(family, where):
    model = create(family).train()
    wrap(model, where)
    model.set_grad_checkpointing()
    assert [module.grad_checkpointing for module in model.modules() if isinstance(module, RecurrentStage)] == [True] * 4


def test_grad_checkpointing_keeps_the_random_numbers(family):
    """Stochastic depth drops the same branches when a block runs again, and the LSTM is at the same state."""
    model = create(family, drop_path_rate=0.5).double().train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        for call in (model, lambda x: model.forward_intermediates(x, intermediates_only=True)[-1]):
            model.zero_grad()
            torch.manual_seed(0)
            call(images().double()).square().mean().backward()
            results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for plain_result, checkpointed in zip(results[:2], results[2:]):
        assert_same(checkpointed, plain_result, 1e-12)
    assert 'lstm.weight_hh' in results[0]


def group_of(name, coarse=False):
    """The group that a parameter or module should be in. What layer attention adds comes after what it attends to."""
    parts = name.split('.')
    if is_extra(name + '.'):
        return 'attention'
    return 'stem' if parts[0] in ('conv1', 'bn1') else '.'.join(parts[:1 if coarse else 2]) if len(parts) > 2 else 'fc'


@pytest.mark.parametrize('group', [group_parameters, group_modules])
@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher(family, coarse, group):
    model = create(family, context='gap_mlp')
    groups = group(model, model.group_matcher(coarse=coarse))
    members = [name for names in groups.values() for name in names]
    expected = model.named_parameters() if group is group_parameters else (
        (name, m) for name, m in model.named_modules() if m._parameters)
    assert sorted(members) == sorted(name for name, _ in expected)

    assert [{group_of(name, coarse) for name in names} for names in groups.values()] == [
        {name} for name in ('stem', *(STAGES if coarse else BLOCKS), 'attention', 'fc')]


def decays(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g['weight_decay'], g.get('lr_scale', 1.)) for g in groups for p in g['params']}


def test_layer_decay(model):
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    order = ['stem', *BLOCKS, 'attention', 'fc']
    for found in (decays(model, groups), decays(model, optimizer.param_groups)):
        assert set(found) == {name for name, _ in model.named_parameters()}
        for name, (_, scale) in found.items():
            assert scale == 0.5 ** (len(order) - 1 - order.index(group_of(name))), name


def test_weight_decay(model):
    weights = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    matrices = {'lstm.weight_ih', 'lstm.weight_hh', *(f'{name}.weight' for name in weights)}
    optimizers = [create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.1, **kwargs)
                  for kwargs in ({}, dict(layer_decay=0.5))]
    for groups in (param_groups_weight_decay(model, 0.1), *(optimizer.param_groups for optimizer in optimizers)):
        found = decays(model, groups)
        assert set(found) == {name for name, _ in model.named_parameters()}
        assert {name for name, (decay, _) in found.items() if decay} == matrices


def test_classifier_has_the_last_parameters(model):
    """By their order timm tells them, when adaptive gradient clipping is to spare them."""
    spared = {id(p) for p in model.parameters()} - {id(p) for p in model_parameters(model, exclude_head=True)}
    assert spared == {id(model.fc.weight), id(model.fc.bias)}


def test_freeze(family, model):
    parts = ('conv1', 'bn1', 'layer1')
    freeze(model, parts)
    assert_same_logits(model, create(family).eval(), 1e-5)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = gradients(model.train(), images())
    assert set(trained) == {name for name, _ in model.named_parameters() if not name.startswith(parts)}
    assert {'lstm.weight_ih', 'lstm.weight_hh'} <= set(trained)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and not [name for name in changed if name.startswith(parts)]

    unfreeze(model, parts)
    assert set(gradients(model, images())) == {name for name, _ in create(family).named_parameters()}


@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_device(family, device):
    model = timm.create_model(family, device=device, **FAMILIES[family])
    assert {t.device.type for t in model.state_dict().values()} == {device}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtype(family, dtype):
    model = timm.create_model(family, dtype=dtype, **FAMILIES[family]).eval()
    assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}  # BN counts its batches
    logits = model(images().to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize('zero_init_last', [True, False])
def test_init_weights_from_meta(family, zero_init_last):
    model = timm.create_model(family, device='meta', num_classes=100).to_empty(device='cpu')
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 99)
    torch.manual_seed(0)
    model.init_weights(zero_init_last=zero_init_last)

    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = name.endswith('.bn3' if 'resnet50' in family else '.bn2')
            assert (module.weight == (0 if last and zero_init_last else 1)).all() and not module.bias.any()
            assert not module.running_mean.any() and (module.running_var == 1).all()
            assert module.num_batches_tracked == 0
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        elif isinstance(module, (nn.Linear, nn.LSTMCell)):
            bound = (module.hidden_size if isinstance(module, nn.LSTMCell) else module.in_features) ** -0.5
            for p in module.parameters():
                assert p.abs().max() <= bound * (1 + 1e-6)
                if p.numel() >= 1000:  # uniform
                    assert p.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


# Number formats and memory formats ---------------------------------------------------------------------------------

def flat(tensors):
    return torch.cat([t.float().flatten() for t in tensors])


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('family, dtype, tol, tol_gradients', [
    *((family, torch.bfloat16, 0.03, 0.15) for family in FAMILIES),
    ('rla_resnet50', torch.float16, 0.005, 0.05),  # slow on a CPU
], ids=str, indirect=['family'])
def test_autocast(family, dtype, tol, tol_gradients, training):
    # Smooth, as rounding turns some ReLUs on or off, which has little effect on logits and a large one on gradients
    model, x = create(family, act_layer='silu').train(training), images()
    logits, expected = model(x), gradients(model, x)
    with torch.autocast('cpu', dtype):
        lower = model(x)
        found = gradients(model, x)
    assert lower.dtype == dtype
    assert_same(lower.float(), logits, tol)
    assert {g.dtype for g in found.values()} == {torch.float32}
    difference = flat(found.values()) - flat(expected.values())
    assert difference.norm() < tol_gradients * flat(expected.values()).norm()


def test_bfloat16_weights(model):
    expected = model(images())
    logits = model.bfloat16()(images().bfloat16())
    assert logits.dtype == torch.bfloat16
    assert_same(logits.float(), expected, 0.05)
    assert all(g.isfinite().all() for g in gradients(model.train(), images().bfloat16()).values())


@pytest.mark.parametrize('training', [False, True])
def test_channels_last(family, training):
    model = create(family).double().train(training)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images().double()
    features = last.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert_same(features, model.forward_features(x), 1e-12)
    assert_same(gradients(last, x.to(memory_format=torch.channels_last)), gradients(model, x), 1e-10)


# Graphs ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def shallow(family):
    """Two blocks, since capturing takes a time that grows with their number."""
    return create(family, **TWO_BLOCKS).double().eval()


@pytest.mark.long(but=['*-True', 'rla_vector*'])
@pytest.mark.parametrize('training', [False, True])
def test_compile(shallow, training):
    model, x = shallow.train(training), images().double()
    compiled = copy.deepcopy(model)
    # All of inductor but the code that it writes, which takes a C++ compiler minutes. A graph break is an error.
    compiled.compile(backend='aot_eager_decomp_partition', fullgraph=True)
    assert_same(gradients(compiled, x), gradients(model, x), 1e-10)
    assert_same(compiled(x), model(x), 1e-12)
    assert_same(compiled.state_dict(), model.state_dict(), 1e-12)  # the statistics of norm layers


@pytest.mark.long(but=['rla_resnet50'])
def test_compile_for_any_batch_size(shallow):
    counter, compiled, graphs = torch._dynamo.testing.CompileCounter(), copy.deepcopy(shallow), []
    compiled.compile(backend=counter, fullgraph=True, dynamic=True)
    for batch_size in (2, 3, 5):
        x = images(batch_size=batch_size).double()
        assert_same(gradients(compiled, x), gradients(shallow, x), 1e-10)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_export(shallow):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(shallow, (images(batch_size=2).double(),), dynamic_shapes=shapes).module()
    for batch_size, size in ((1, (64, 96)), (3, (64, 96)), (5, (97, 50)), (2, (224, 224))):
        x = images(batch_size=batch_size, size=size).double()
        assert_same(program(x), shallow(x), 1e-12)


@pytest.mark.long(but=['rla_seresnet18'])
def test_onnx(shallow):
    pytest.importorskip('torch', minversion='2.6')  # the exporter of 2.5 fails at every batch norm, timm's too
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = shallow.float()
    program = torch.onnx.export(
        model, (images(batch_size=2),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.AUTO},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch_size in (1, 2, 5):
        x = images(batch_size=batch_size)
        logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same(torch.from_numpy(logits), model(x), 1e-5)


def test_fx(model):
    # A tracer does not see in which order a block may pool
    assert_same_logits(torch.fx.symbolic_trace(model), model, 1e-6)


def test_feature_extractor_of_torchvision(model):
    feature_extraction = pytest.importorskip('torchvision.models.feature_extraction')
    nodes = {'layer2': 'two', 'layer3.0': 'three', 'fc': 'logits'}
    features = feature_extraction.create_feature_extractor(model, nodes)(images())
    two, three = model.forward_intermediates(images(), [2, 3], intermediates_only=True)
    assert_same(features, dict(two=two, three=three, logits=model(images())), 1e-6)


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_jit_trace(shallow):  # test_torchscript.py has torch.jit.script
    model = shallow.float()
    traced = torch.jit.trace(model, images(batch_size=2))
    for kwargs in (dict(batch_size=2), dict(batch_size=5), dict(batch_size=3, size=(71, 50))):
        assert_same_logits(traced, model, 1e-5, **kwargs)


def test_int8_weights(model):
    quantization = pytest.importorskip('torchao.quantization')
    expected = model(images())
    float_weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert all(type(model.get_submodule(name).weight) is not type(weight) for name, weight in float_weights.items())
    assert any(is_extra(name + '.') for name in float_weights)
    assert_same(model(images()), expected, 0.02)


# Conversions and copies --------------------------------------------------------------------------------------------

def test_model_ema(family, model):
    ema, later = ModelEmaV3(model, decay=0.75), create(family)
    for p in later.parameters():
        p.data += 0.1
    ema.update(later)
    before, after = model.state_dict(), later.state_dict()
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            assert_same(value, 0.75 * before[name] + 0.25 * after[name], 1e-6)
    assert_same_logits(ema, ema.module)


@pytest.mark.parametrize('convert, layer', [
    (convert_splitbn_model, SplitBatchNorm2d), (convert_sync_batchnorm, nn.SyncBatchNorm),
])
def test_convert_norm_layers(model, convert, layer):
    converted = convert(copy.deepcopy(model)).eval()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(type(converted.get_submodule(name)) is layer for name in norms)
    assert_same_logits(converted, model, 1e-5)
    if layer is SplitBatchNorm2d:  # normalises each half of a batch by itself
        halves = [copy.deepcopy(model).train()(half) for half in images().chunk(2)]
        assert_same(converted.train()(images()), torch.cat(halves), 1e-5)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
def test_copies(model, duplicate):
    other = duplicate(model)
    assert_same_logits(other, model)
    for p in other.parameters():
        p.data.zero_()
    assert all(p.any() for p in model.parameters())


def save_torch(model, path):
    torch.save(model.state_dict(), path / 'weights.pth')
    return lambda new: new.load_state_dict(torch.load(path / 'weights.pth', weights_only=True))


def save_safetensors(model, path):
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(model.state_dict(), path / 'weights.safetensors')
    return lambda new: new.load_state_dict(safetensors.load_file(path / 'weights.safetensors'))


def save_checkpoint(model, path):
    torch.save(dict(state_dict={f'module.{k}': v for k, v in model.state_dict().items()}), path / 'last.pth.tar')
    return lambda new: load_checkpoint(new, str(path / 'last.pth.tar'))


@pytest.mark.parametrize('save', [save_torch, save_safetensors, save_checkpoint])
def test_weights_of_a_file(family, model, save, tmp_path):
    load = save(model, tmp_path)
    new = timm.create_model(family, **FAMILIES[family]).eval()
    load(new)
    assert_same(new.state_dict(), model.state_dict())
    assert_same_logits(new, model)


def test_folder_of_the_hub(family, model, tmp_path):
    args = {name: value for name, value in FAMILIES[family].items() if name != 'num_classes'}
    timm.models.save_for_hf(model, tmp_path, model_args=args)
    assert_same_logits(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), model)


def test_deterministic(model):
    x = images()
    assert torch.equal(model(x), model(x))


def test_images_do_not_see_each_other(model):
    x, other = images(), images(seed=2)
    other[1] = x[1]
    assert torch.equal(model(x)[1], model(other)[1])
    assert_same(model(x[1:2]), model(x)[1:2], 1e-5)


# More than one process ---------------------------------------------------------------------------------------------

DDP_BATCHES = 2  # unused parameters would be found at the second


def ddp_gradients(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    results = {}
    for family in FAMILIES:
        for checkpointing in (False, True):
            model = freeze_batch_norm_2d(create(family)).double().train()
            model.set_grad_checkpointing(checkpointing)
            ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
            for batch in range(DDP_BATCHES):
                results[family, checkpointing, batch] = gradients(ddp, images(seed=batch).double().chunk(2)[rank])
    torch.save(results, f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def ddp_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ddp')
    torch.multiprocessing.spawn(ddp_gradients, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason='this build of torch has no torch.distributed')
@pytest.mark.long
@pytest.mark.parametrize('checkpointing', [False, True])
def test_ddp(family, checkpointing, ddp_results):
    model = freeze_batch_norm_2d(create(family)).double().train()
    for batch in range(DDP_BATCHES):
        expected = gradients(model, images(seed=batch).double())
        assert set(expected) == {name for name, _ in model.named_parameters()}
        for result in ddp_results:
            found = result[family, checkpointing, batch]
            assert_same({name.removeprefix('module.'): grad for name, grad in found.items()}, expected, 1e-10)


# Wrong usage -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kwargs', [
    # Like any network with a recurrent path ours are not run module by module, which is what ResNets have by default.
    *[dict(features_only=True, feature_cls='getter', out_indices=indices) for indices in ((5,), (0, -6), 6, 0)],
    dict(output_stride=4), dict(output_stride=64), dict(unknown=1), dict(global_pool='median'),
    dict(act_layer='unknown'), dict(drop_path_rate='high'),
    dict(pretrained=True, pretrained_cfg_overlay=dict(url='', hf_hub_id=None)),
], ids=str)
def test_errors_of_create_model(family, kwargs):
    theirs = error_of(lambda: plain(**kwargs))
    assert theirs is not None
    ours = error_of(lambda: timm.create_model(family, **dict(FAMILIES[family], **kwargs)))
    assert ours == (theirs[0], theirs[1].replace('resnet18', family))
