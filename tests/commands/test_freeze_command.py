"""`timm-rla freeze`: from a training run to a checkpoint of timm's plain network."""
import json
import shutil

import pytest
import timm
import torch

import timm_rla_cli as cli

TRAIN = ['train', '--device', 'cpu', '--model', 'rla_seresnet20_cifar', '--model-kwargs', 'layers=(1,1,1)',
         'context=gmp', '--num-classes', '10', '--img-size', '8', '--batch-size', '16', '--workers', '0', '--epochs',
         '2', '--lr', '0.05', '--warmup-epochs', '0', '--experiment', 'run']


@pytest.fixture(scope='module')
def run(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('freeze')
    assert cli.main([*TRAIN, '--data-dir', str(image_folder), '--output', str(output)]) == 0
    return output / 'run'


def test_checkpoint_is_one_of_timm(run, image_folder, tmp_path, capsys):
    output = tmp_path / 'new' / 'plain.pth.tar'
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    assert cli.main(['freeze', str(run / 'last.pth.tar'), *options, '--output', str(output), '--study']) == 0
    study = json.loads((tmp_path / 'new' / 'plain.json').read_text())
    assert study['model'] == 'rla_seresnet20_cifar' and set(study['held']) == set(study['blocks'])
    out = capsys.readouterr().out
    assert 'Top-1 with attention' in out and 'layer3.0' in out and str(output) in out
    model = timm.create_model('seresnet20_cifar', layers=(1, 1, 1), num_classes=10)
    model.load_state_dict(torch.load(output, weights_only=False)['state_dict'])

    assert cli.main(['validate', '--checkpoint', str(output), *options, '--results-file',
                     str(tmp_path / 'r.json'), '--results-format', 'json']) == 0
    top1 = json.loads((tmp_path / 'r.json').read_text())['top1']
    assert f'with its means {top1:.2f} %' in out and study['means']['second'] == pytest.approx(top1)
    assert cli.main(['export', str(output), str(tmp_path / 'export')]) == 0

    assert cli.main(['freeze', str(run / 'last.pth.tar'), *options, '--output', str(output)]) == 2
    assert 'there is a file of that name' in capsys.readouterr().err
    assert cli.main(['freeze', str(run / 'last.pth.tar'), *options, '--output', str(output / 'x.pth')]) == 2
    assert 'plain.pth.tar/x.pth: ' in capsys.readouterr().err
    assert cli.main(['freeze', str(output), *options]) == 2
    assert 'seresnet20_cifar has no layer attention' in capsys.readouterr().err


def test_missing_validation_split_is_named_before_the_work(run, image_folder, tmp_path, capsys):
    data = shutil.copytree(image_folder, tmp_path / 'data')
    (data / 'validation').rename(data / 'test')
    assert cli.main(['freeze', str(run / 'last.pth.tar'), '--data-dir', str(data), '--device', 'cpu', '--workers', '0',
                     '--output', str(tmp_path / 'frozen.pth.tar')]) == 2
    captured = capsys.readouterr()
    assert 'expected; --val-split test takes that one' in captured.err and 'Attention' not in captured.err
    assert not (tmp_path / 'frozen.pth.tar').exists()
