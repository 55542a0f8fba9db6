"""A network with constant attentions becomes timm's plain network, with the same logits."""
import pytest
import timm
import torch
from helpers import randomise
from timm.models.resnet import ResNet

from timm_rla.analysis.attention import attention_modules
from timm_rla.models.freeze import plain_name, plain_network

CASES = [
    ('rla_resnet18', {}), ('rla_seresnet18', {}), ('rla_vector_resnet18', {}), ('rla_vector_resnet50', {}),
    ('rla_seresnet50', dict(layers=(1, 1, 1, 1))), ('rla_resnet18', dict(attn_layer='eca')),
    ('rla_vector_resnet18', dict(attn_layer='se')), ('rla_resnet20_cifar', {}), ('rla_seresnet20_cifar', {}),
    ('rla_vector_resnet20_cifar', dict(in_chans=1)),
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
    if not {'attn_layer', 'layers'} & set(kwargs):
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
