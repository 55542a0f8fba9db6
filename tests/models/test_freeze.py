"""A network with constant attentions becomes timm's plain network, with the same logits."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.parametrizations as parametrizations
from helpers import randomise
from timm.data import resolve_data_config
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import timm_rla
from timm_rla.analysis.attention import attention_modules
from timm_rla.models.blocks import RLABasicBlock
from timm_rla.models.freeze import plain_network
from timm_rla.models.network import RLAResNet
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


def test_data_configuration_is_that_of_the_network():
    """Whoever makes a transform from the plain network sees the images as the network saw them."""
    model = timm.create_model('rla_resnet18.backbone_tv_in1k', num_classes=5, pretrained_cfg_overlay=dict(
        mean=(0.1, 0.2, 0.3), input_size=(3, 64, 64), label_names=list('abcde')), **SMALL)
    frozen = timm_rla.freeze_attention(model, BATCHES, **SMALL)
    assert resolve_data_config(model=frozen) == resolve_data_config(model=model)
    assert resolve_data_config(model=frozen) != resolve_data_config(model=timm.create_model('resnet18', **SMALL))
    assert frozen.pretrained_cfg['label_names'] == list('abcde')
    assert frozen.pretrained_cfg['architecture'] == 'resnet18' and 'hf_hub_id' not in frozen.pretrained_cfg


@pytest.mark.parametrize('loader', [
    [BATCHES[0][0]], [tuple(BATCHES[0])], [[*BATCHES[0], torch.arange(3)]], [(BATCHES[0][0], torch.rand(3, 7))],
    (batch for batch in BATCHES),
], ids=['images', 'pairs', 'triples', 'soft labels', 'stream'])
def test_labels_are_not_needed(loader):
    torch.manual_seed(0)
    model = randomise(timm.create_model('rla_resnet18', num_classes=7, **SMALL)).eval()
    expected = timm_rla.freeze_attention(model, BATCHES, **SMALL).state_dict()
    for key, weight in timm_rla.freeze_attention(model, loader, **SMALL).state_dict().items():
        assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize('loader, words', [
    ([], '^the loader holds no images$'),
    (DataLoader(TensorDataset(torch.zeros(3, 3, 32, 32)), batch_size=4, drop_last=True), 'holds no images'),
    ([dict(image=torch.zeros(2, 3, 32, 32))], '^batches of dict; images .* are expected'),
])
def test_what_is_no_loader_of_images(loader, words):
    with pytest.raises(ValueError, match=words):
        timm_rla.freeze_attention(timm.create_model('rla_resnet18', num_classes=7, **SMALL), loader, **SMALL)


def test_images_that_are_drawn_again_count_again():
    torch.manual_seed(0)
    model = randomise(timm.create_model('rla_resnet18', num_classes=7, **SMALL)).eval()
    images = torch.randn(4, 3, 32, 32)
    drawn = [0, 1, 2, 3, 3, 3, 3]  # more than there are
    loader = DataLoader(images, batch_size=2, sampler=drawn)
    found = timm_rla.freeze_attention(model, loader, **SMALL).state_dict()
    for key, weight in timm_rla.freeze_attention(model, [images[drawn]], **SMALL).state_dict().items():
        torch.testing.assert_close(found[key], weight)


def test_classifier_may_be_another():
    model = timm.create_model('rla_resnet18', **SMALL)
    model.fc = nn.Linear(model.num_features, 5)
    assert timm_rla.freeze_attention(model, BATCHES, **SMALL).fc.out_features == 5
    model.fc = nn.Sequential(model.fc)
    with pytest.raises(ValueError, match=r'fc.0.weight has shape \[5, 16\], there it is missing'):
        timm_rla.freeze_attention(model, BATCHES, **SMALL)


def test_arguments_of_create_model():
    """Those that say what is loaded do not matter, and None is what timm takes it for."""
    model = timm.create_model('rla_seresnet18', num_classes=7, attn_layer=None, **SMALL)
    frozen = timm_rla.freeze_attention(
        model, BATCHES, pretrained=True, pretrained_cfg_overlay={}, attn_layer=None, **SMALL)
    assert frozen.layer1[0].se is not None
    built = RLAResNet(RLABasicBlock, (1, 1, 1, 1), channels=(8, 16, 16, 16))
    with pytest.raises(ValueError, match='no pretrained_cfg'):
        timm_rla.freeze_attention(built, BATCHES)


def test_random_numbers_go_on():
    model = timm.create_model('rla_resnet18', num_classes=7, **SMALL)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    timm_rla.freeze_attention(model, BATCHES, **SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_types_and_ranges():
    model = timm.create_model('rla_seresnet18', num_classes=7, **SMALL).eval()
    head = model.layer2[0].attention
    nn.init.zeros_(head.fc2.weight)
    nn.init.constant_(head.fc2.bias, -13)  # the attention is 2.3e-6, by which SE's first layer is divided
    timm_rla.freeze_attention(model, BATCHES, **SMALL)
    with pytest.raises(ValueError, match='layer2.0.se.fc1.weight would be too large for torch.float16'):
        timm_rla.freeze_attention(model.half(), BATCHES, **SMALL)
    nn.init.constant_(head.fc2.bias, -120)
    with pytest.raises(ValueError, match='^the attention of block layer2.0 is 0; it must be above 0'):
        timm_rla.freeze_attention(model.float(), BATCHES, **SMALL)
    model.conv1.half()
    with pytest.raises(ValueError, match='^weights of several types, torch.float16, torch.float32;'):
        timm_rla.freeze_attention(model, BATCHES, **SMALL)


def freeze_in_group(rank, folder):
    """Five images in two processes, shared out by a sampler, which repeats one; and in the first process alone."""
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    model, images = torch.load(f'{folder}/model.pt', weights_only=False)
    shared = DataLoader(images, batch_size=2, sampler=DistributedSampler(images))
    torch.save(timm_rla.freeze_attention(model, shared, **SMALL).state_dict(), f'{folder}/{rank}.pt')
    if rank == 0:
        alone = timm_rla.freeze_attention(model, DataLoader(images, batch_size=2), **SMALL)
        torch.save(alone.state_dict(), f'{folder}/alone.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_images_of_all_processes_count_once(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model('rla_resnet18', num_classes=7, **SMALL)).eval()
    images = torch.randn(5, 3, 32, 32)
    torch.save((model, images), tmp_path / 'model.pt')
    torch.multiprocessing.spawn(freeze_in_group, (str(tmp_path),), nprocs=2)
    expected = timm_rla.freeze_attention(model, [images], **SMALL).state_dict()
    for name in ('0', '1', 'alone'):
        for key, weight in torch.load(tmp_path / f'{name}.pt').items():
            torch.testing.assert_close(weight, expected[key], msg=f'{name} {key}')
