"""A network with constant attentions becomes timm's plain network, with the same logits."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations as parametrizations
from helpers import randomise
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model

import timm_rla
from timm_rla.analysis.attention import attention_modules
from timm_rla.models.freeze import plain_network
from timm_rla.models.warm_start import plain_name

CASES = [
    ('rla_resnet18', {}), ('rla_seresnet18', {}), ('rla_vector_resnet18', {}), ('rla_vector_resnet50', {}),
    ('rla_seresnet50', dict(layers=(1, 1, 1, 1))), ('rla_resnet18', dict(attn_layer='eca')),
    ('rla_vector_resnet18', dict(attn_layer='se')), ('rla_resnet20_cifar', {}), ('rla_seresnet20_cifar', {}),
    ('rla_vector_resnet20_cifar', dict(in_chans=1)),
    ('rla_resnet18', dict(norm_layer='rmsnorm2d', zero_init_last=False)),  # without bias
]


@pytest.mark.parametrize('name, kwargs', CASES, ids=str)
def test_same_logits(name, kwargs):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=7, **kwargs)).double().eval()
    x = torch.randn(3, kwargs.get('in_chans', 3), 32, 48, dtype=torch.float64)
    attention = {name: torch.rand(head.fc2.out_features, dtype=torch.float64).mul(0.9).add(0.05)
                 for name, head in attention_modules(model).items()}
    handles = [head.register_forward_hook(lambda module, args, out, a=attention[name]: a.expand_as(out))
               for name, head in attention_modules(model).items()]
    expected = model(x)
    for handle in handles:
        handle.remove()
    plain = plain_network(model, attention, **kwargs)
    assert isinstance(plain, ResNet) and not attention_modules(plain) and not hasattr(plain, 'lstm')
    assert not plain.training and plain.conv1.weight.dtype == torch.float64
    assert (plain(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    state = timm.create_model(plain_name(name), num_classes=7, in_chans=kwargs.get('in_chans', 3)).state_dict()
    if not {'attn_layer', 'layers', 'norm_layer'} & set(kwargs):
        assert list(plain.state_dict()) == list(state)  # any timm loads it


def test_what_cannot_be_frozen():
    model = timm.create_model('rla_resnet18', num_classes=7)
    with pytest.raises(ValueError, match='no attention for block layer1.1; .* layer1.0'):
        plain_network(model, {'layer1.0': torch.ones(1)})
    model = timm.create_model('rla_resnet18', num_classes=7, attn_layer='cbam')
    attention = dict.fromkeys(attention_modules(model), torch.full((1,), 0.5))
    with pytest.raises(ValueError, match='Cbam.* cannot be rescaled; what can is SEModule'):
        plain_network(model, attention, attn_layer='cbam')
    with pytest.raises(ValueError, match='give those that the network was created with'):
        model = timm.create_model('rla_resnet18', num_classes=7, layers=(1, 1, 1, 1))
        plain_network(model, dict.fromkeys(attention_modules(model), torch.full((1,), 0.5)))
    model = timm.create_model('rla_vector_resnet18', num_classes=7, attn_layer='eca')
    attention = {name: torch.full((head.fc2.out_features,), 0.5) for name, head in attention_modules(model).items()}
    with pytest.raises(ValueError, match='EcaModule .* channel by channel'):  # it has one kernel for all channels
        plain_network(model, attention, attn_layer='eca')


SMALL = dict(layers=(1, 2, 1, 0), channels=(8, 16, 16, 16))
BATCHES = [(torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6]))]


def folded(model):
    return reparameterize_model(model)


def pruned(model):
    model.prune_intermediate_layers([1, 2])
    return model


def without_classifier(model):
    model.reset_classifier(0)
    return model


def weight_normed(model):
    parametrizations.weight_norm(model.layer2[0].conv1)
    return model


def checkpointed(model):
    wrapper = pytest.importorskip('torch.distributed.algorithms._checkpoint.checkpoint_wrapper')
    model.layer2[1] = wrapper.checkpoint_wrapper(model.layer2[1])
    return model


def features(model):
    return timm.create_model('rla_resnet18', features_only=True, out_indices=(1, 2), **SMALL)


def plain(model):
    return timm.create_model('resnet18', **SMALL)


@pytest.mark.parametrize('change, words', [
    (folded, 'missing bn1.bias.* unexpected conv1.bias.*: not folded'),
    (pruned, 'missing layer3.0.* not folded, pruned'),
    (without_classifier, 'no classifier'),
    (weight_normed, 'unexpected layer2.0.conv1.parametrizations.* or parametrised$'),
    (checkpointed, r'^block layer2.1\S* is wrapped; give the network without wrappers$'),
    (features, '^StageFeatures has no layer attention'),
    (plain, '^ResNet has no layer attention'),
])
def test_what_is_no_network_to_freeze(change, words):
    """It says so in one line, before it looks at the images."""
    model = change(timm.create_model('rla_resnet18', num_classes=7, **SMALL))
    with pytest.raises(ValueError, match=words) as error:
        timm_rla.freeze_attention(model, None, **SMALL)
    assert '\n' not in str(error.value)


def test_modes_are_left_as_they_are():
    model = timm.create_model('rla_resnet18', num_classes=7, **SMALL).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    timm_rla.freeze_attention(model, BATCHES, **SMALL)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize('pool', ['max', 'avgmax', 'catavgmax', 'fast'])
def test_pooling_is_that_of_the_network(pool):
    """Not said again; on one pixel, which the last map of small images has, all poolings are the same."""
    torch.manual_seed(0)
    kwargs = dict(SMALL, channels=(8, 16, 32, 32))
    model = randomise(timm.create_model('rla_resnet18', num_classes=7, global_pool=pool, **kwargs)).eval()
    frozen = timm_rla.freeze_attention(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 6]))], **kwargs)
    assert frozen.global_pool.pool_type == pool


def test_pooling_that_was_replaced():
    model = timm.create_model('rla_resnet18', num_classes=7, **SMALL)
    model.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    timm_rla.freeze_attention(model, BATCHES, **SMALL)  # it is that of the plain network
    model.global_pool[0] = nn.AdaptiveMaxPool2d(1)
    with pytest.raises(ValueError, match='deviates'):
        timm_rla.freeze_attention(model, BATCHES, **SMALL)


def test_logits_may_be_zero():
    model = timm.create_model('rla_resnet18', num_classes=7, **SMALL).eval()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    frozen = timm_rla.freeze_attention(model, BATCHES, **SMALL)
    assert not frozen(BATCHES[0][0]).any()


def test_labels_of_no_class():
    model = timm.create_model('rla_resnet18', num_classes=7, **SMALL)
    with pytest.raises(ValueError, match='^labels 0 to 7: the model has classes 0 to 6'):
        timm_rla.freeze_attention(model, [(BATCHES[0][0], torch.tensor([0, 7, 6]))], **SMALL)
