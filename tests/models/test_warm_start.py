"""Warm start: an RLA network made from the weights of a network without layer attention returns the same logits."""
import logging
import re
from functools import partial
from inspect import signature

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from helpers import randn, randomise
from timm.data import resolve_data_config
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FilterResponseNormTlu2d, GroupNormAct
from timm.models.resnet import Bottleneck, ResNet

from timm_rla.ops.gated_norm import set_form

PAIRS = sorted({name.split('.')[0] for name in timm.list_pretrained('rla_*')})
SOURCES = {  # of each network that without layer attention
    name: re.fullmatch('rla_(vector_)?(.*)', name)[2] for name in timm.list_models('rla_*', exclude_filters='*_cifar')
}
SMALL = dict(layers=(1, 2, 1, 1), channels=(16, 16, 32, 32))
FULL_SIZE = ('rla_resnet18', 'rla_resnet50')
IMAGES = randn(2, 3, 64, 64, dtype=torch.float32)


def source_of(name, **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(SOURCES[name], **kwargs))


def warm(name, state_dict, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), **kwargs)


def test_tags_cover_the_networks_with_hosted_weights():
    assert PAIRS == sorted(set(SOURCES) - {'rla_seresnet18', 'rla_seresnet101'})  # timm has none for these two


@pytest.fixture(params=['off', 'on'])
def form(request):
    """The general and the fused form of the blocks in training."""
    set_form(request.param)
    return request.param


def assert_same_logits(model, source, images, form):
    """Bit for bit; only the fused form, which reorders the arithmetic, in training up to rounding.

    In double precision then, as in single precision a deep network makes much of rounding, the source itself, too.
    """
    assert torch.equal(model.eval()(images), source.eval()(images))
    with torch.no_grad():
        assert torch.equal(model(images), source(images))
    if form == 'off':
        assert torch.equal(model.train()(images), source.train()(images))
    else:
        expected = source.double().train()(images.double())
        assert (model.double().train()(images.double()) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize('name', PAIRS)
def test_logits_are_bit_for_bit_those_of_the_source(name, form):
    size = {} if name in FULL_SIZE else SMALL
    source = source_of(name, **size)
    model = warm(name, source.state_dict(), **size)
    assert_same_logits(model, source, IMAGES, form)
    buffers = dict(model.named_buffers())
    for key, buffer in source.named_buffers():
        if form == 'off':
            assert torch.equal(buffers[key], buffer), key
        else:
            torch.testing.assert_close(buffers[key], buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['rla_resnet18', 'rla_seresnet50', 'rla_vector_resnet18'])
def test_one_step_changes_the_attention(name):
    model = warm(name, source_of(name, **SMALL).state_dict(), **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    heads = [key for key in before if key.endswith('attention.fc2.weight')]
    assert len(heads) == sum(len(getattr(model, f'layer{i}')) for i in range(1, 5))
    for key in heads:
        assert not before[key].any() and model.state_dict()[key].any(), key


def test_torchvision():
    torch.manual_seed(0)
    source = randomise(torchvision.models.resnet50()).eval()
    assert torch.equal(warm('rla_resnet50', source.state_dict()).eval()(IMAGES), source(IMAGES))


@pytest.mark.parametrize('attn_layer', ['eca', 'ese', 'se'])
def test_other_intra_layer_attention(attn_layer, form):
    torch.manual_seed(0)
    source = randomise(ResNet(Bottleneck, (1, 1, 1, 1), block_args=dict(attn_layer=attn_layer)))
    model = warm('rla_resnet50', source.state_dict(), layers=(1, 1, 1, 1), attn_layer=attn_layer)
    assert_same_logits(model, source, IMAGES, form)


@pytest.mark.parametrize('norm_layer', [partial(nn.BatchNorm2d, bias=False), 'rmsnorm2d'], ids=['bn', 'rms'])
def test_norms_without_bias(norm_layer, form):
    if norm_layer != 'rmsnorm2d' and 'bias' not in signature(nn.BatchNorm2d).parameters:
        pytest.skip('batch norm always has a bias in this version of torch')
    kwargs = dict(SMALL, norm_layer=norm_layer, zero_init_last=False)
    source = source_of('rla_resnet18', **kwargs)
    assert 'layer1.0.bn2.bias' not in source.state_dict()
    assert_same_logits(warm('rla_resnet18', source.state_dict(), **kwargs), source, IMAGES, form)


def test_norms_without_weight_are_an_error():
    kwargs = dict(SMALL, norm_layer=partial(nn.BatchNorm2d, affine=False), zero_init_last=False)
    source = timm.create_model('resnet18', **kwargs)
    with pytest.raises(ValueError, match='^the last norm of a block must have a weight, .*: layer1.0.bn2 has none$'):
        warm('rla_resnet18', source.state_dict(), **kwargs)


@pytest.mark.parametrize('norm_layer, exact', [
    ('batchnorm2d', True), (partial(BatchNormAct2d, act_layer=nn.LeakyReLU), True), (EvoNorm2dB0, True),
    (partial(BatchNormAct2d, act_layer=nn.SiLU), False), (FilterResponseNormTlu2d, False),
    (partial(GroupNormAct, num_groups=4, act_layer=nn.GELU), False),
], ids=str)
def test_norms_with_an_activation_are_exact_or_an_error(norm_layer, exact, form):
    kwargs = dict(SMALL, norm_layer=norm_layer, zero_init_last=False)
    source = source_of('rla_resnet18', **kwargs)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if exact:
        assert_same_logits(warm('rla_resnet18', source.state_dict(), **kwargs), source, IMAGES, form)
    else:
        with pytest.raises(RuntimeError, match='no warm start with .* as the last norm of a block: its '):
            warm('rla_resnet18', source.state_dict(), **kwargs)


def test_attention_that_has_no_exact_form_is_an_error():
    source = ResNet(Bottleneck, (1, 1, 1, 1), block_args=dict(attn_layer='cbam'))
    with pytest.raises(RuntimeError, match='CbamModule.*SEModule'):
        warm('rla_resnet50', source.state_dict(), layers=(1, 1, 1, 1), attn_layer='cbam')


@pytest.mark.parametrize('context', ['gmp', 'gap_mlp'])
def test_other_contexts(context):
    source = source_of('rla_resnet18', **SMALL).eval()
    model = warm('rla_resnet18', source.state_dict(), context=context, hidden_dim=16, reduction=4, **SMALL).eval()
    assert torch.equal(model(IMAGES), source(IMAGES))
    with torch.no_grad():
        assert torch.equal(model(IMAGES), source(IMAGES))


def test_a_checkpoint_of_an_rla_network_is_taken_as_it_is(tmp_path):
    torch.manual_seed(0)
    trained = randomise(timm.create_model('rla_resnet18', **SMALL)).eval()
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'trained.pth')
    overlay = dict(file=str(tmp_path / 'trained.pth'))
    model = timm.create_model('rla_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    assert torch.equal(model(IMAGES), trained(IMAGES))


def test_other_number_of_classes_and_channels():
    source = source_of('rla_resnet18', **SMALL).eval()
    model = warm('rla_resnet18', source.state_dict(), num_classes=10, in_chans=1, **SMALL).eval()
    grey = IMAGES[:, :1]
    # timm sums the weights of the three channels, in another order than a convolution does
    expected = source.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.forward_features(grey), expected, rtol=1e-4, atol=1e-4)
    assert model(grey).shape == (2, 10)


def test_features_only():
    source = source_of('rla_resnet18', **SMALL).eval()
    model = warm('rla_resnet18', source.state_dict(), features_only=True, out_indices=(1, 3), **SMALL).eval()
    expected = source.forward_intermediates(IMAGES, (1, 3), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model(IMAGES), expected))


def test_source_is_not_changed():
    state_dict = source_of('rla_resnet18', **SMALL).state_dict()
    before = {key: value.clone() for key, value in state_dict.items()}
    warm('rla_resnet18', state_dict, num_classes=10, **SMALL)
    assert state_dict.keys() >= before.keys() - {'fc.weight', 'fc.bias'}
    assert all(torch.equal(state_dict[key], before[key]) for key in state_dict)


@pytest.mark.parametrize('num_classes', [1000, 10])  # timm is not strict where the classifier differs
@pytest.mark.parametrize('name, source, words', [
    ('rla_resnet50', 'resnet34', 'missing layer1.0.bn3'),
    ('rla_resnet18', 'resnet34', 'unexpected layer1.2'),
    ('rla_resnet18', 'seresnet18', 'unexpected layer1.0.se'),
    ('rla_seresnet18', 'resnet18', 'missing layer1.0.se'),
    ('rla_resnet50', 'resnet50d', 'missing conv1.weight'),
    ('rla_resnet18', 'vgg11', 'missing bn1'),
    ('rla_resnet18', 'rla_resnet34', 'unexpected layer1.2'),
    ('rla_resnet34', 'rla_resnet18', 'missing layer1.2'),
    ('rla_resnet18', 'rla_seresnet18', 'unexpected layer1.0.se'),
])
def test_weights_of_another_network(name, source, words, num_classes):
    with torch.device('meta'):
        state_dict = timm.create_model(source, num_classes=1000).state_dict()
        with pytest.raises(RuntimeError, match=f'neither those of this network .*{words}'):
            warm(name, state_dict, num_classes=num_classes)


def test_old_checkpoints_without_counters():
    source = source_of('rla_resnet18', **SMALL).eval()
    state_dict = {key: value for key, value in source.state_dict().items() if 'num_batches_tracked' not in key}
    assert torch.equal(warm('rla_resnet18', state_dict, **SMALL).eval()(IMAGES), source(IMAGES))


@pytest.mark.parametrize('tag', timm.list_pretrained('rla_*'))
def test_tag(tag):
    """Weights and data configuration are those of the source, and the tag says that they are its."""
    name, _, tag_name = tag.partition('.')
    assert tag_name.startswith('backbone_')
    source = timm.get_pretrained_cfg(f'{SOURCES[name]}.{tag_name.removeprefix("backbone_")}')
    cfg = timm.get_pretrained_cfg(tag)
    assert cfg.hf_hub_id == source.hf_hub_id == f'timm/{source.architecture}.{source.tag}'
    configs = [resolve_data_config(pretrained_cfg=c.to_dict()) for c in (cfg, source)]
    assert configs[0] == configs[1]


def test_log_says_that_the_attention_is_untrained(caplog):
    with caplog.at_level(logging.INFO, logger='timm_rla'):
        warm('rla_resnet18', source_of('rla_resnet18', **SMALL).state_dict(), **SMALL)
    assert 'untrained' in caplog.text
