"""The parts of a run: weights that a network starts from."""
import pytest
import timm
import torch

import timm_rla_cli as cli
from timm_rla.train.options import model_arguments, train_parser
from timm_rla.train.setup import create_network


def weights(folder, name, **kwargs):
    """File with random weights of a network of ten classes, and these."""
    state_dict = timm.create_model(name, **kwargs).state_dict()
    torch.save(dict(state_dict={f'module.{key}': weight for key, weight in state_dict.items()}), folder / 'trained.pth')
    return str(folder / 'trained.pth'), state_dict


@pytest.mark.parametrize('trained, model, words', [
    ('resnet20_cifar', 'resnet32_cifar', 'missing layer1.3.'),
    ('resnet32_cifar', 'resnet20_cifar', 'unexpected layer1.3.'),
    ('resnet20_cifar', 'seresnet20_cifar', 'missing layer1.0.se.'),
    ('seresnet20_cifar', 'resnet20_cifar', 'unexpected layer1.0.se.'),
    ('rla_resnet20_cifar', 'resnet20_cifar', 'unexpected layer1.0.attention'),
    ('rla_resnet32_cifar', 'rla_resnet20_cifar', 'unexpected layer1.3.'),
    ('resnet20_cifar', 'rla_resnet32_cifar', 'missing layer1.3.'),
])
def test_weights_of_another_network(image_folder, tmp_path, capsys, trained, model, words):
    """timm would load what fits, and leave the rest as it was."""
    path, _ = weights(tmp_path, trained)
    command = ['train', '--model', model, '--pretrained-path', path, '--data-dir', str(image_folder), '--device', 'cpu',
               '--output', str(tmp_path / 'out')]
    assert cli.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(error) < 1000 and words in error
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['resnet20_cifar', 'seresnet20_cifar', 'rla_resnet20_cifar'])
def test_weights_with_other_classes(tmp_path, name):
    path, trained = weights(tmp_path, name)
    args = train_parser().parse_args(['--pretrained-path', path, '--num-classes', '3'])
    found = create_network(name, {}, model_arguments(args), path).state_dict()
    assert len(found['fc.bias']) == 3
    for key in trained:
        assert key.startswith('fc.') or torch.equal(found[key], trained[key]), key
