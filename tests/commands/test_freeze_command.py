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


@pytest.mark.parametrize('options, words', [
    (['--study', '--val-split', ''], "--study --val-split '': a study is of the accuracy on that split"),
    (['--output', 'f.safetensors'], '--output f.safetensors: a checkpoint is written'),
    (['--class-map', 'nope.txt'], '--class-map nope.txt: no such file'),
    (['--output', '.'], '--output .: is a folder'),
    (['--output', '/'], '--output /: is a folder'),
])
def test_bad_input(run, image_folder, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['freeze', str(run / 'last.pth.tar'), '--data-dir', str(image_folder), '--device', 'cpu',
                     '--workers', '0', '--output', 'frozen.pth.tar', *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and 'Attention' not in captured.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize('checkpoint', ['.', '/'])
def test_a_folder_in_the_place_of_the_checkpoint(capsys, checkpoint):
    assert cli.main(['freeze', checkpoint, '--data-dir', '.']) == 2
    assert f'CHECKPOINT {checkpoint}: is a folder without a checkpoint' in capsys.readouterr().err


def test_what_cannot_be_frozen_is_said_before_the_work(image_folder, tmp_path, capsys):
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    model = ['--model', 'rla_vector_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', 'attn_layer=eca']
    assert cli.main([*TRAIN, *model, *options, '--epochs', '1', '--output', str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.main(['freeze', str(tmp_path / 'run' / 'last.pth.tar'), *options]) == 2
    captured = capsys.readouterr()
    assert 'EcaModule inside the blocks cannot be rescaled' in captured.err and 'Attention' not in captured.err


def test_pooling_precision_and_card(image_folder, tmp_path):
    """Pooling is that of the run, weights keep their type, and the card says what the network was made of."""
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    assert cli.main([*TRAIN, *options, '--epochs', '1', '--gp', 'max', '--img-size', '16', '--output',
                     str(tmp_path)]) == 0
    folder = tmp_path / 'run'
    assert cli.main(['curves', str(folder), '--output', str(folder / 'curves.png')]) == 0
    assert cli.main(['freeze', str(folder / 'last.pth.tar'), *options, '--model-dtype', 'bfloat16']) == 0
    content = torch.load(folder / 'frozen.pth.tar', weights_only=False)
    assert all(value.dtype != torch.bfloat16 for value in content['state_dict'].values())
    assert cli.main(['export', str(folder / 'frozen.pth.tar'), str(tmp_path / 'export')]) == 0
    card = (tmp_path / 'export' / 'README.md').read_text()
    assert '**Made of:** `rla_seresnet20_cifar`, each layer attention held at its mean' in card
    assert 'model: rla_seresnet20_cifar' in card and 'curves.png' not in card
    assert timm.create_model(f'local-dir:{tmp_path / "export"}').global_pool.pool_type == 'max'


def test_images_are_those_of_the_run(image_folder, tmp_path, capsys):
    """A tag says how images are prepared, and so do the options of the run; the plain name says it otherwise."""
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    model = ['--model', 'rla_resnet18.backbone_tv_in1k', '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(8,16,16,16)']
    assert cli.main([*TRAIN, *model, *options, '--img-size', '16', '--epochs', '1', '--std', '0.3', '0.2', '0.1',
                     '--model-ema', '--output', str(tmp_path)]) == 0
    for weights in (['--use-ema'], []):
        (tmp_path / 'run' / 'frozen.pth.tar').unlink(missing_ok=True)
        capsys.readouterr()
        assert cli.main(['freeze', str(tmp_path / 'run' / 'last.pth.tar'), *options, *weights]) == 0
        input_of_run = [line for line in capsys.readouterr().err.splitlines() if 'Input:' in line]
        assert 'interpolation bilinear' in input_of_run[0] and 'std (0.3, 0.2, 0.1)' in input_of_run[0]
        assert cli.main(['export', str(tmp_path / 'run' / 'frozen.pth.tar'), str(tmp_path / f'export{weights}')]) == 0
        card = (tmp_path / f'export{weights}' / 'README.md').read_text()
        assert ('exponential moving average' in card) == bool(weights) and 'With timm installed' in card
        assert cli.main(['validate', '--checkpoint', str(tmp_path / 'run' / 'frozen.pth.tar'), *options]) == 0
        found = [line for line in capsys.readouterr().err.splitlines() if 'Input:' in line]
        assert found[-1].partition('Input:')[2] == input_of_run[0].partition('Input:')[2]


def test_both_files_or_none(run, image_folder, tmp_path, capsys, monkeypatch):
    """A disk that is full at the second file leaves no first one, which the next try would stumble over."""
    def save(*args, **kwargs):
        raise RuntimeError('unexpected pos 64 vs 0')  # as torch says it

    monkeypatch.setattr(torch, 'save', save)
    assert cli.main(['freeze', str(run / 'last.pth.tar'), '--data-dir', str(image_folder), '--device', 'cpu',
                     '--workers', '0', '--output', str(tmp_path / 'f.pth.tar'), '--study']) == 2
    assert 'unexpected pos' in capsys.readouterr().err and not list(tmp_path.iterdir())
