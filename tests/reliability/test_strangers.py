"""Checkpoints and recipes from strangers: nothing in them opens a file or an address, runs code or fills the memory."""
import argparse
import re
import socket
import zipfile

import pytest
import timm
import torch
import yaml

import timm_rla_cli as cli
from timm_rla.common.checkpoint import read_checkpoint
from timm_rla.common.errors import UserError
from timm_rla.common.networks import NetworkSpec, load_network
from timm_rla.common.trained import training_options
from timm_rla.common.yaml_files import read_mapping

ARGS = dict(model='rla_resnet20_cifar', model_kwargs=dict(layers=(1, 1, 1)), num_classes=10)


@pytest.fixture(scope='module')
def weights():
    return timm.create_model(ARGS['model'], **ARGS['model_kwargs']).state_dict()


@pytest.fixture
def write(tmp_path, weights):
    def write(args=None, **content):
        path = tmp_path / 'c.pth.tar'
        namespace = argparse.Namespace(**{**ARGS, **(args or {})})
        torch.save(dict(dict(state_dict=weights, args=namespace, epoch=3), **content), path)
        return str(path)

    return write


@pytest.fixture
def no_network(monkeypatch):
    def connect(*args):
        raise AssertionError('opened an address')

    monkeypatch.setattr(socket.socket, 'connect', connect)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('name', [
    'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'pretrained', 'pretrained_strict',
    'features_only', 'scriptable', 'block', 'feature_cls', 'pretrained_filter_fn',
])
def test_only_arguments_of_the_architecture(write, tmp_path, weights, no_network, caplog, name):
    trap = tmp_path / 'trap.pth'
    torch.save(dict(state_dict=Code(tmp_path / 'ran')), trap)
    value = {'pretrained_cfg_overlay': dict(file=str(trap)), 'pretrained_cfg': dict(file=str(trap)),
             'pretrained': True, 'features_only': True}.get(name, str(trap))
    network = load_network(NetworkSpec(checkpoint=write(dict(model_kwargs={**ARGS['model_kwargs'], name: value}))))
    assert torch.equal(network.model.state_dict()['fc.weight'], weights['fc.weight'])
    assert name in caplog.text and not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('model', ['hf-hub:someone/else', 'hf_hub:someone/else', 'local-dir:/etc'])
def test_model_of_another_place(write, no_network, model):
    with pytest.raises(UserError, match='never opened for a checkpoint'):
        load_network(NetworkSpec(checkpoint=write(dict(model=model))))


@pytest.mark.parametrize('kwargs', [
    dict(hidden_dim=10 ** 9), dict(hidden_dim=30_000, context_dim=30_000), dict(layers=[10 ** 9] * 3),
    dict(layers=[500] * 3), dict(channels=[2 ** 20] * 3), dict(stem_width=10 ** 12), dict(context_dim=-1),
    dict(base_width=10 ** 6),
])
def test_sizes_that_would_fill_the_memory(write, kwargs):
    with pytest.raises(UserError, match='weights|damaged|context_dim|larger|more'):
        load_network(NetworkSpec(checkpoint=write(dict(model_kwargs={**ARGS['model_kwargs'], **kwargs}))))


def test_weights_larger_than_their_file(write, weights):
    large = {**weights, 'fc.weight': torch.zeros(1).expand(10 ** 6, 10 ** 6)}
    with pytest.raises(UserError, match='fc.weight has shape'):
        load_network(NetworkSpec(checkpoint=write(state_dict=large)))


def test_packed_file(write, tmp_path):
    path, packed = write(), tmp_path / 'packed.pth'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match='no checkpoint, damaged'):
        read_checkpoint(str(packed), '--checkpoint')


@pytest.mark.parametrize('option', ['--pretrained-path', '--initial-checkpoint', '--resume', '--checkpoint'])
def test_code_does_not_run(image_folder, tmp_path, capsys, option):
    trap = tmp_path / 'trap.pth'
    torch.save(dict(state_dict=Code(tmp_path / 'ran')), trap)
    command = 'validate' if option == '--checkpoint' else 'train'
    options = ['--model', ARGS['model'], '--data-dir', str(image_folder), '--device', 'cpu', '--img-size', '8',
               '--workers', '0', '--batch-size', '16']
    if command == 'train':
        options += ['--output', str(tmp_path / 'out')]
    if option == '--pretrained-path':
        options += ['--pretrained']
    assert cli.main([command, option, str(trap), *options]) == 2
    assert 'with code in it, which is never run' in capsys.readouterr().err
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors', 'a.safetensors', 'a.pth'])
def test_code_in_the_folder_of_a_saved_model_does_not_run(image_folder, tmp_path, capsys, name):
    """Whichever file timm would take."""
    folder = tmp_path / 'saved'
    timm.models.save_for_hf(timm.create_model(ARGS['model'], **ARGS['model_kwargs']), folder,
                            model_args=ARGS['model_kwargs'], safe_serialization=True)
    if name == 'pytorch_model.bin':
        (folder / 'model.safetensors').unlink()
    torch.save(dict(state_dict=Code(tmp_path / 'ran')), folder / name)
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--img-size', '8', '--workers', '0', '--epochs', '1',
               '--batch-size', '16']
    code = cli.main(['train', '--model', f'local-dir:{folder}', '--pretrained', *options, '--output',
                     str(tmp_path / 'out')])
    assert not (tmp_path / 'ran').exists()
    if name.startswith('a.'):  # beside the model's own file
        assert code == 0
    else:
        assert code == 2 and f'--model local-dir: {folder}' in capsys.readouterr().err


@pytest.mark.parametrize('args', [
    dict(num_classes='10'), dict(num_classes=-1), dict(num_classes=10 ** 12), dict(model_kwargs=[1]), dict(in_chans=0),
    dict(input_size=[3, 8]), dict(mean=['a']), dict(std=[float('nan')]), dict(crop_pct='all'), dict(gp=3),
    dict(interpolation=[]), dict(label_names=3), dict(img_size=2 ** 40), dict(bn_eps='small'),
    dict(mean=torch.zeros(3)), dict(model_kwargs=dict(act_layer=torch.zeros(3))), dict(label_names=[['x'] * 3]),
    dict(img_size=100_000), dict(input_size=[3, 100_000, 100_000]),
])
def test_options_that_are_none(write, args):
    path = write(args)
    with pytest.raises(UserError, match='damaged, its options have ' + next(iter(args))) as error:
        training_options(read_checkpoint(path, '--checkpoint'), f'--checkpoint {path}')
    assert len(str(error.value)) < 500 and '\n' not in str(error.value)


@pytest.mark.parametrize('change, words', [
    (dict(device='meta'), 'its model_args have device'),
    (dict(checkpoint_path='c.pth'), 'its model_args have checkpoint_path'),
    (dict(drop_rate='x'), "drop_rate 'x': must be from 0 to 1"),
    (dict(layers=[1_000_000, 1, 1]), 'damaged, its model has layers'),
    (dict(hidden_dim=30_000), 'weights of another network; '),
    (dict(reduction='a'), '--model local-dir:'),
    (dict(), ''),
], ids=str)
def test_configuration_of_a_saved_model(tmp_path, weights, no_network, change, words):
    model = timm.create_model(ARGS['model'], **ARGS['model_kwargs'])
    timm.models.save_for_hf(model, tmp_path, model_args={**ARGS['model_kwargs'], **change})
    spec = NetworkSpec(model=f'local-dir:{tmp_path}')
    if change:
        with pytest.raises(UserError, match=re.escape(words)):
            load_network(spec)
    else:
        loaded = load_network(spec).model
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_input_of_a_saved_model(tmp_path, no_network):
    model = timm.create_model(ARGS['model'], **ARGS['model_kwargs'])
    for config in dict(mean=['a']), dict(input_size=[3, 100_000, 100_000]):
        model.pretrained_cfg.update(config)
        timm.models.save_for_hf(model, tmp_path, model_args=ARGS['model_kwargs'])
        with pytest.raises(UserError, match='^model input: '):
            load_network(NetworkSpec(model=f'local-dir:{tmp_path}'))


@pytest.mark.parametrize('args', [
    dict(mean=[1e300] * 3), dict(std=[0, 0, 0]), dict(crop_pct=-1), dict(crop_pct=95), dict(bn_eps=0)], ids=str)
def test_options_out_of_range(write, args):
    path = write(args)
    with pytest.raises(UserError, match=f'^--checkpoint .*: {next(iter(args))} .*: must be '):
        training_options(read_checkpoint(path, '--checkpoint'), f'--checkpoint {path}')


@pytest.mark.parametrize('content', [
    dict(epoch='three'), dict(epoch=2.5), dict(epoch=True), dict(epoch=-7), dict(epoch=10 ** 20), dict(epoch=[1]),
    dict(state_dict=torch.zeros(3)), dict(state_dict=[1]), dict(state_dict={'a': 1}), dict(state_dict_ema=3),
    dict(state_dict_ema=torch.zeros(2)), dict(optimizer=3), dict(optimizer=torch.zeros(3)), dict(optimizer={}),
    dict(optimizer=dict(state={}, param_groups=3)), dict(optimizer=dict(state={}, param_groups=[])),
], ids=str)
def test_damaged_checkpoints(image_folder, tmp_path, write, capsys, content):
    path = write(**content)
    assert cli.main(['train', '--resume', path, '--model', ARGS['model'], '--model-kwargs', 'layers=(1,1,1)',
                     '--data-dir', str(image_folder), '--device', 'cpu', '--img-size', '8', '--workers', '0',
                     '--model-ema', '--output', str(tmp_path / 'out'), '--batch-size', '16']) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f'--resume {path}' in error and len(error) < 1200
    assert not (tmp_path / 'out').exists()


def test_optimizer_of_another_shape(image_folder, tmp_path, write, weights, capsys):
    model = timm.create_model(ARGS['model'], **ARGS['model_kwargs'])
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    state['state'][0]['momentum_buffer'] = torch.zeros(1, 1, 1, 1)
    path = write(optimizer=state)
    assert cli.main(['train', '--resume', path, '--model', ARGS['model'], '--model-kwargs', 'layers=(1,1,1)', '--opt',
                     'momentum', '--weight-decay', '0', '--data-dir', str(image_folder), '--device', 'cpu',
                     '--img-size', '8', '--workers', '0', '--output', str(tmp_path / 'out'), '--batch-size', '16']) == 2
    assert 'state of the optimizer' in capsys.readouterr().err


def test_weights_that_are_not_finite(write, weights):
    broken = {key: value.clone() for key, value in weights.items()}
    broken['layer2.0.conv1.weight'][0] = float('nan')
    with pytest.raises(UserError, match='not finite, first in layer2.0.conv1.weight'):
        load_network(NetworkSpec(checkpoint=write(state_dict=broken)))


BOMB = 'a: &a [' + ', '.join(['x'] * 10) + ']\n' + ''.join(
    f'{b}: &{b} [' + ', '.join([f'*{a}'] * 10) + ']\n' for a, b in zip('abcdefgh', 'bcdefghi'))
MERGES = 'a: &a {x: 1}\n' + ''.join(
    f'{b}: &{b} {{<<: [' + ', '.join([f'*{a}'] * 10) + ']}\n' for a, b in zip('abcdefgh', 'bcdefghi'))


@pytest.mark.parametrize('text', [
    BOMB, MERGES, 'a: &a [*a]', '[' * 20_000, 'x: ' + '{a: ' * 3000, b'epochs: \xff\xfe\x80', '- 1', 'epochs', '3: 4',
    '!!python/object/apply:os.system [ls]', 'model: !!python/name:os.system', 'x: "' + 'y' * (2 << 20) + '"', '\0',
    'a: b: c', 'lr: !!float x', '%YAML 3.0', 'a: 0o9_\n? b',
], ids=lambda text: str(text[:12]))
def test_yaml_of_strangers(tmp_path, text):
    path = tmp_path / 'c.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        assert isinstance(read_mapping(path, f'--config {path}'), dict)
    except UserError as e:
        assert str(e).startswith(f'--config {path}') and len(str(e)) <= 1100 and '\n' not in str(e)
    else:
        assert text in ('%YAML 3.0', 'a: 0o9_\n? b')


def test_yaml_with_aliases(tmp_path):
    path = tmp_path / 'c.yaml'
    content = dict(mean=[0.5, 0.5, 0.5])
    content['std'] = content['mean']
    path.write_text(yaml.safe_dump(content))
    assert '*' in path.read_text() and read_mapping(path, '--config') == content
