"""The parts of a run: weights that a network starts from, and options that do not go together."""
import shutil

import pytest
import timm
import torch
from helpers import TINY_RUN, train

import timm_rla_cli as cli
from timm_rla.common.errors import UserError
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


@pytest.mark.parametrize('plain, model', [
    ('resnet20_cifar', 'rla_resnet20_cifar'), ('resnet20_cifar', 'rla_vector_resnet20_cifar'),
    ('seresnet20_cifar', 'rla_seresnet20_cifar'), ('rla_resnet20_cifar', 'rla_resnet20_cifar'),
])
def test_initial_checkpoint_returns_the_same_logits(tmp_path, plain, model):
    """With the classifier, which --pretrained-path leaves out."""
    path, state_dict = weights(tmp_path, plain)
    started = create_network(model, {}, {}, initial_checkpoint=path).eval()
    source = timm.create_model(plain).eval()
    source.load_state_dict(state_dict)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(started(images), source(images))


def test_initial_checkpoint_of_another_network(tmp_path):
    path, _ = weights(tmp_path, 'resnet32_cifar')
    with pytest.raises(UserError, match=f'^--initial-checkpoint {path}: .* unexpected layer1.3.'):
        create_network('rla_resnet20_cifar', {}, {}, initial_checkpoint=path)


@pytest.mark.parametrize('options, words', [
    (['--mixup', '0.2', '--batch-size', '33'], '--batch-size 33: must be even'),
    (['--cutmix', '1', '--batch-size', '7', '--in-memory'], '--batch-size 7: must be even'),
    (['--cutmix-minmax', '0.8'], '--cutmix-minmax 0.8: must be two numbers'),
    (['--cutmix-minmax', '0.8', '0.2'], '--cutmix-minmax 0.8 0.2: must be two numbers'),
    (['--scale', '1', '0.5'], '--scale 1.0 0.5: must be two numbers'),
    (['--ratio', '3'], '--ratio 3.0: must be two numbers'),
    (['--model', 'resnet20_cifar', '--bn-momentum', '0.1'], '--bn-momentum: no such argument of resnet20_cifar'),
    (['--model', 'resnet18', '--model-kwargs', "block_args={'foo':1}"], '--model-kwargs foo: no such argument of'),
    (['--model', 'resnet18', '--model-kwargs', 'blokc=1'], '--model-kwargs blokc: no such argument of resnet18'),
    (['--head-init-bias', 'nan'], '--head-init-bias nan: must be'),
    (['--model', 'dla46_c', '--model-kwargs', '--grad-checkpointing'], '--grad-checkpointing: dla46_c'),
    (['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', '--head-init-scale', '0.1'],
     '--head-init-scale: deit_tiny'),
])
def test_options_that_do_not_go_together(image_folder, tmp_path, capsys, options, words):
    common = [*TINY_RUN, '--data-dir', str(image_folder), '--workers', '0', '--output', str(tmp_path / 'out')]
    assert cli.main(['train', *common, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('names, words', [('abcdefghij', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, not a, b, c'),
                                          ('x123456789', '0, not x')])
def test_goes_on_with_the_same_classes(image_folder, tmp_path, capsys, names, words):
    """Else the weights of a class would take the name of another."""
    data = shutil.copytree(image_folder, tmp_path / 'data')
    options = [*TINY_RUN, '--workers', '0', '--output', str(tmp_path), '--resume', 'auto', '--epochs']
    assert cli.main(['train', *options, '1', '--data-dir', str(data)]) == 0
    for split in data.iterdir():
        for old, new in zip('0123456789', names):
            (split / old).rename(split / new)
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    assert cli.main(['train', *options, '2', '--data-dir', str(data)]) == 2
    assert f'trained on other classes than those of the data: {words}' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before


def test_epoch_repeats_of_a_folder_are_said_to_do_nothing(image_folder, tmp_path, caplog):
    train(image_folder, tmp_path, '--workers', '0', '--epochs', '1', '--epoch-repeats', '3')
    assert '--epoch-repeats 3 has no effect: it is for streams' in caplog.text
