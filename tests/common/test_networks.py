"""Networks by name, and as a training run has left them: with the input that the run was validated with."""
import argparse

import pytest
import torch
from timm.data import resolve_data_config
from timm.models import create_model

from timm_rla.common.errors import UserError
from timm_rla.common.input_spec import InputSpec
from timm_rla.common.networks import NetworkSpec, load_network

SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))  # of rla_resnet18, whose size for testing is 288


@pytest.fixture
def run(tmp_path):
    """Write a checkpoint of a run with these options; returns its path."""

    def write(**options):
        channels = options.get('in_chans') or options.get('input_size', (3,))[0]
        model = create_model('rla_resnet18', in_chans=channels, **SMALL)
        args = argparse.Namespace(**{'model': 'rla_resnet18', 'model_kwargs': SMALL, 'num_classes': None, **options})
        torch.save(dict(args=args, state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
        return str(tmp_path / 'last.pth.tar')

    return write


def of_training(model, options):
    """What timm's train.py validates with."""
    return dict(resolve_data_config(options, model=model), crop_mode='center')


@pytest.mark.parametrize('options', [
    {},
    dict(img_size=224),
    dict(img_size=64, crop_pct=0.8, interpolation='bilinear'),
    dict(input_size=(3, 32, 48), mean=(0.1, 0.2, 0.3), std=(0.5,)),
    dict(crop_pct=0.875, interpolation='nearest'),
], ids=str)
@pytest.mark.parametrize('use_test_size', [False, True])
def test_run_is_validated_as_in_training(run, options, use_test_size):
    network = load_network(NetworkSpec(checkpoint=run(**options), use_test_size=use_test_size))
    assert network.data_config == of_training(network.model, options)
    for_testing = resolve_data_config({}, model=network.model, use_test_size=True)
    assert (for_testing['input_size'], for_testing['crop_pct']) == ((3, 288, 288), 1.0)  # what it must not be


def test_training_crops_in_the_centre():
    """Whatever the network's configuration says: neither timm's train.py nor ours reads it there."""
    model = create_model('rla_resnet18', **SMALL)
    model.pretrained_cfg = dict(model.pretrained_cfg, crop_mode='squash')
    spec = NetworkSpec('rla_resnet18')
    assert spec.input.resolve(model)['crop_mode'] == 'squash'
    assert spec.completed(dict(model='rla_resnet18')).input.resolve(model)['crop_mode'] == 'center'


def test_what_is_said_comes_first(run):
    said = InputSpec(img_size=96, crop_pct=0.5, mean=(0.1, 0.2, 0.3), crop_mode='squash')
    options = dict(input_size=(3, 32, 48), crop_pct=0.8, interpolation='bilinear', std=(0.5, 0.6, 0.7))
    config = load_network(NetworkSpec(checkpoint=run(**options), input=said)).data_config
    assert config == dict(input_size=(3, 96, 96), crop_pct=0.5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7),
                          interpolation='bilinear', crop_mode='squash')


def test_arguments_of_the_model_that_are_said_are_added_to_those_of_the_run(run):
    spec = NetworkSpec(model_kwargs=dict(drop_path_rate=0.1, hidden_dim=8))
    trained = dict(model='rla_resnet18', model_kwargs=dict(context='gmp', hidden_dim=4))
    assert spec.completed(trained).model_kwargs == dict(context='gmp', hidden_dim=8, drop_path_rate=0.1)


def test_a_named_model_has_its_size_for_testing(run):
    """As with timm's validate.py; the checkpoint has the weights only."""
    spec = NetworkSpec('rla_resnet18', SMALL, checkpoint=run(img_size=64, crop_pct=0.8))
    config = load_network(spec).data_config
    assert (config['input_size'], config['crop_pct']) == ((3, 288, 288), 1.0)


@pytest.mark.parametrize('said, size', [
    ({}, (1, 32, 32)), (dict(img_size=48), (1, 48, 48)), (dict(input_size=(1, 16, 24)), (1, 16, 24))])
@pytest.mark.parametrize('options', [dict(input_size=(1, 32, 32)), dict(in_chans=1, img_size=32)], ids=str)
def test_channels_of_a_run_are_kept_at_another_size(run, said, size, options):
    network = load_network(NetworkSpec(checkpoint=run(**options), input=InputSpec(**said)))
    assert network.data_config['input_size'] == size and network.model.conv1.in_channels == 1


@pytest.mark.parametrize('channels', [1, 4])
def test_channels_without_a_size(channels):
    """The size is that of the network's configuration; mean and standard deviation are those of timm's prefetcher."""
    model = create_model('rla_resnet18', in_chans=channels, **SMALL)
    config = InputSpec(in_chans=channels).resolve(model)
    assert config['input_size'] == (channels, 224, 224)
    assert config['mean'] == pytest.approx((0.449,) * channels) and config['std'] == pytest.approx((0.226,) * channels)


@pytest.mark.parametrize(
    'said', [dict(in_chans=1), dict(input_size=(1, 32, 32)), dict(in_chans=1, img_size=32)], ids=str)
def test_three_numbers_for_one_channel(said):
    """As a recipe for colours has them: their mean, wherever the number of channels is said."""
    model = create_model('rla_resnet18', in_chans=1, **SMALL)
    config = InputSpec(mean=(0.1, 0.2, 0.6), std=(0.9, 0.2, 0.4), **said).resolve(model)
    assert config['mean'] == pytest.approx((0.3,)) and config['std'] == pytest.approx((0.5,))


def test_epsilon_of_batch_norm_is_that_of_training():
    spec = NetworkSpec().completed(dict(model='mobilenetv3_small_050', bn_eps=0.01, num_classes=10))
    norms = [m for m in load_network(spec).model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(norm.eps == 0.01 for norm in norms)


@pytest.mark.parametrize('args', [None, dict(model='rla_resnet18'), argparse.Namespace(lr=0.1)], ids=str)
def test_checkpoint_that_names_no_model(tmp_path, args):
    torch.save(dict(args=args, state_dict={}), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='--model: not given'):
        load_network(NetworkSpec(checkpoint=str(tmp_path / 'a.pth')))


def test_a_classifier_needs_pooling():
    with pytest.raises(UserError, match="^--gp '': a classifier needs pooling"):
        load_network(NetworkSpec('rla_resnet18', global_pool=''))


def test_images_of_another_size_than_that_of_the_patches():
    """timm's networks of patches are built for a size, and complain of others only in their forward pass."""
    spec = dict(depth=1, embed_dim=8, num_heads=1)
    model = create_model('vit_tiny_patch16_224', **spec)
    with pytest.raises(UserError, match='^images of 96 x 96: the network is built for 224 x 224 .--img-size 224.; '):
        InputSpec(img_size=96).resolve(model)
    assert InputSpec().resolve(model)['input_size'] == (3, 224, 224)
    for given in dict(img_size=96), dict(dynamic_img_size=True):
        other = create_model('vit_tiny_patch16_224', **spec, **given)
        config = InputSpec(img_size=96).resolve(other)
        assert other.eval()(torch.zeros(1, *config['input_size'])).shape == (1, 1000)
