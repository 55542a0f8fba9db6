"""`timm-rla attention` and `timm-rla gradcam`: what they write is right, and bad input is one line."""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import create_model

import timm_rla_cli as cli
from timm_rla.analysis import record_attention, stack_attention
from timm_rla.common.options import parse
from timm_rla.train.options import train_parser
from timm_rla.train.run import train

TINY = dict(layers=(1, 1, 1))


@pytest.fixture(scope='module')
def trained(image_folder, tmp_path_factory):
    """Checkpoints of a small RLA network and of a plain one, in the folders of their runs."""
    output = tmp_path_factory.mktemp('runs')
    options = ['--data-dir', str(image_folder), '--output', str(output), '--device', 'cpu', '--workers', '0',
               '--model-kwargs', 'layers=(1,1,1)', '--img-size', '8', '--batch-size', '16', '--epochs', '1',
               '--mean', '0.5', '0.5', '0.5', '--std', '0.4', '0.4', '0.4']
    return [train(parse(train_parser(), [*options, '--model', model])) / 'last.pth.tar'
            for model in ('rla_resnet20_cifar', 'resnet20_cifar')]


CPU = ['--device', 'cpu']
READ = [*CPU, '--workers', '0']


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """Run a command that must fail; returns its line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        assert cli.main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert error.count('error:') == 1 and 'Traceback' not in error, error
        assert 'error:' in error.strip().splitlines()[-1], error
        return error.strip().splitlines()[-1]

    return run


def read_rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_attention_command(trained, image_folder, capsys):
    checkpoint = trained[0]
    assert cli.main(['attention', '--checkpoint', str(checkpoint), '--data-dir', str(image_folder), *READ,
                     '--batch-size', '7', '--class', '3', '4']) == 0
    out = capsys.readouterr().out.splitlines()
    folder = checkpoint.parent
    assert out[-3:] == [str(folder / name) for name in ('attention.png', 'attention-classes.png', 'attention.csv')]
    assert all(Path(path).stat().st_size > 200 for path in out[-3:])

    # everything at once, and numpy
    model = create_model('rla_resnet20_cifar', **TINY).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    paths = sorted((image_folder / 'validation').rglob('*.png'))
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths]) / 255
    with record_attention(model) as attention, torch.no_grad():
        model(torch.tensor((pixels - 0.5) / 0.4, dtype=torch.float32).permute(0, 3, 1, 2))
    values = stack_attention(attention).double().numpy()
    labels = np.array([int(path.parent.name) for path in paths])
    rows = read_rows(folder / 'attention.csv')
    assert len(rows) == 3 * (1 + 10)
    for row in rows:
        chosen = values[labels == int(row['class'])] if row['class'] else values
        block = chosen[:, list(attention).index(row['block'])]
        assert int(row['images']) == len(block)
        assert float(row['mean']) == pytest.approx(block.mean(), abs=1e-6)
        assert float(row['std']) == pytest.approx(block.std(), abs=1e-6)
    for line, row in zip(out[1:4], rows):
        assert line.split()[1:3] == [f'{float(row["mean"]):.4f}', f'{float(row["std"]):.4f}']


def test_attention_picture_goes_into_the_model_card(trained, image_folder, tmp_path):
    """That of these weights alone."""
    run = shutil.copytree(trained[0].parent, tmp_path / 'run')
    last, first = run / 'last.pth.tar', run / 'first.pth.tar'
    torch.save(dict(torch.load(last, weights_only=False), metric=0.), first)
    for checkpoint, shown in ((last, True), (first, False)):
        options = ['--data-dir', image_folder, *READ, '--output', run / 'attention.png']
        assert cli.main(list(map(str, ['attention', '--checkpoint', checkpoint, *options]))) == 0
        assert cli.main(['export', str(last), str(tmp_path / f'export-{shown}')]) == 0
        card = (tmp_path / f'export-{shown}' / 'README.md').read_text()
        assert ('(attention.png)' in card) == shown == (tmp_path / f'export-{shown}' / 'attention.png').exists()


@pytest.mark.long
def test_attention_over_processes(trained, image_folder, tmp_path):
    """29 images on 2 processes: timm's sampler reads one twice, which must not count."""
    data = tmp_path / 'data'
    for path in sorted((image_folder / 'validation').rglob('*.png'))[:29]:
        copy = data / 'validation' / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    arguments = ['attention', '--checkpoint', str(trained[0]), '--data-dir', str(data), *READ, '--batch-size', '4']
    assert cli.main([*arguments, '--output', str(tmp_path / 'one.svg')]) == 0
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'timm_rla',
         *arguments, '--output', str(tmp_path / 'two.pdf')],
        capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('block') == 1  # the first process alone prints
    for one, two in zip(read_rows(tmp_path / 'one.csv'), read_rows(tmp_path / 'two.csv'), strict=True):
        assert one['images'] == two['images'] and (one['class'], one['block']) == (two['class'], two['block'])
        for key in ('mean', 'std'):  # float32 differs in the last digit between batches
            assert float(one[key]) == pytest.approx(float(two[key]), abs=1e-7)
    assert '<svg' in (tmp_path / 'one.svg').read_text() and (tmp_path / 'two.pdf').read_bytes()[:4] == b'%PDF'


@pytest.mark.parametrize('options, words', [
    (['--model', 'resnet20_cifar'], ['resnet20_cifar', 'rla_']),
    (['--model', 'rla_resnet20_cifr'], ['rla_resnet20_cifr', 'rla_resnet20_cifar']),
    (['--model', 'rla_resnet20_cifar', '--data-dir', 'nowhere'], ['nowhere']),
    (['--model', 'rla_resnet20_cifar', '--data-dir', 'empty'], ['empty']),
    (['--model', 'rla_resnet20_cifar', '--class', '10'], ['10', '0 to 9']),
    (['--model', 'rla_resnet20_cifar', '--class', 'frog'], ['frog']),
    (['--model', 'rla_resnet20_cifar', '--num-classes', '5'], ['5', '10']),
    (['--model', 'rla_resnet20_cifar', '--output', 'a.bmp'], ['a.bmp', '.png, .svg or .pdf']),
    (['--checkpoint', 'no.pth'], ['no.pth']),
    ([], ['--model']),
], ids=lambda v: ' '.join(v[-2:]) if v and v[0].startswith('--') else '')
def test_attention_bad_input(fails, tmp_path, image_folder, options, words):
    (tmp_path / 'empty').mkdir()
    line = fails('attention', '--data-dir', image_folder, *READ, *options)
    assert all(word in line for word in words), line


@pytest.fixture
def pictures(tmp_path):
    """Images of different sizes and modes, and among them one that cannot be read."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name, mode, size in (('a.png', 'RGB', (40, 30)), ('b.jpg', 'L', (9, 17)), ('d.png', 'RGBA', (8, 8))):
        Image.effect_noise(size, 64).convert(mode).save(folder / name)
    (folder / 'c.png').write_bytes((folder / 'a.png').read_bytes()[:200])
    return folder


def test_gradcam_command(trained, pictures, tmp_path, capsys):
    rla, plain = map(str, trained)
    arguments = ['gradcam', str(pictures / 'a.png'), '--checkpoint', rla, *CPU]
    for output in ('g.png', 'g.svg', 'g.pdf'):
        assert cli.main([*arguments, '--baseline-checkpoint', plain, '--class', '3',
                         '--output', str(tmp_path / output)]) == 0
        assert f'{tmp_path / output}  a.png: 3, ' in capsys.readouterr().out
    assert 'resnet20_cifar' not in (tmp_path / 'g.svg').read_text()[:200]
    heights = [Image.open(tmp_path / 'g.png').height]
    assert cli.main([*arguments, '--output', str(tmp_path / 'g.png')]) == 0  # without the plain network above
    heights.append(Image.open(tmp_path / 'g.png').height)
    assert heights[0] > heights[1]
    assert '(predicted)' in capsys.readouterr().out


def test_grey_networks(image_folder, pictures, tmp_path, capsys):
    """One channel, of the size and with the mean and standard deviation of a configuration for three."""
    options = ['--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'grey', *READ, '--model',
               'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--in-chans', '1', '--batch-size', '16',
               '--epochs', '1']
    checkpoint = str(train(parse(train_parser(), options)) / 'last.pth.tar')
    assert cli.main(['gradcam', str(pictures / 'a.png'), '--checkpoint', checkpoint, *CPU,
                     '--output', str(tmp_path / 'g.png')]) == 0
    assert f'{tmp_path / "g.png"}  a.png: ' in capsys.readouterr().out
    assert cli.main(['gradcam', str(pictures / 'a.png'), '--checkpoint', checkpoint, *CPU, '--input-img-mode', 'L',
                     '--data-dir', str(image_folder), '--output', str(tmp_path / 'named.png')]) == 0
    assert cli.main(['predict', str(pictures / 'a.png'), '--checkpoint', checkpoint, *CPU]) == 0
    for command in ('attention', 'validate'):
        for prefetcher in ([], ['--no-prefetcher']):
            assert cli.main([command, '--checkpoint', checkpoint, '--data-dir', str(image_folder), *READ,
                             *prefetcher]) == 0


def test_two_channels(pictures, tmp_path):
    assert cli.main(['gradcam', str(pictures / 'a.png'), '--model', 'rla_resnet20_cifar', '--in-chans', '2', *CPU,
                     '--output', str(tmp_path / 'g.png')]) == 0
    assert (tmp_path / 'g.png').is_file()


@pytest.mark.parametrize('sheet', [False, True])
def test_other_images_are_done_where_one_cannot_be_read(trained, pictures, fails, tmp_path, sheet):
    (tmp_path / 'nothing').mkdir()
    line = fails('gradcam', tmp_path / 'nothing', pictures, tmp_path / 'none.png', '--checkpoint', trained[0], *CPU,
                 *['--sheet'][:sheet])
    assert f'{tmp_path / "nothing"}: a folder without images' in line
    assert str(pictures / 'c.png') in line and f'{tmp_path / "none.png"}: No such file' in line
    written = sorted(path.name for path in tmp_path.glob('gradcam*'))
    assert written == (['gradcam.png'] if sheet else ['gradcam-1.png', 'gradcam-2.png', 'gradcam-4.png'])


def test_names_of_classes_come_from_a_dataset(trained, pictures, tmp_path, capsys, fails):
    data = tmp_path / 'named'
    for name in 'airplane automobile bird cat deer dog frog horse ship truck'.split():
        (data / 'validation' / name).mkdir(parents=True)
        (data / 'validation' / name / 'a.png').write_bytes((pictures / 'd.png').read_bytes())
    run = torch.load(trained[0], weights_only=False)
    assert run['args'].label_names == list('0123456789')
    arguments = ['gradcam', str(pictures / 'a.png'), *CPU, '--data-dir', str(data)]
    assert "class 'airplane' is none of those" in fails(*arguments, '--checkpoint', trained[0])
    torch.save(run['state_dict'], tmp_path / 'weights.pth')  # which tell no names
    arguments += ['--model', run['args'].model, '--checkpoint', str(tmp_path / 'weights.pth'), '--model-kwargs',
                  *(f'{key}={value}' for key, value in run['args'].model_kwargs.items())]
    assert cli.main([*arguments, '--class', 'Cat']) == 0
    assert 'a.png: cat, ' in capsys.readouterr().out
    line = fails(*arguments, '--class', 'cut')
    assert 'cut' in line and 'cat' in line


@pytest.mark.parametrize('options, words', [
    (['empty'], ['empty', 'without images']),
    (['a.png', '--layers', 'layer3.0.bn9'], ['layer3.0.bn9', 'layer3.0.bn2']),
    (['a.png', '--class', '10'], ['10', '0 to 9']),
    (['a.png', '--class', 'frog'], ['frog', '0 to 9']),
    (['a.png', '--class', '1', '2'], ['2', '1']),
    (['a.png', '--output', 'g.gif'], ['g.gif', '.png, .svg or .pdf']),
    (['a.png', '--baseline-model', 'resnet18'], ['resnet18', '1000', '10']),
    (['a.png', '--baseline-checkpoint', 'no.pth'], ['no.pth']),
    (['a.png', '--img-size', '0'], ['--img-size 0', 'from 1 to 8192']),
    ([], ['IMAGE']),
], ids=lambda v: ' '.join(v) or 'none')
def test_gradcam_bad_input(trained, fails, pictures, monkeypatch, options, words):
    monkeypatch.chdir(pictures)
    (pictures / 'empty').mkdir()
    line = fails('gradcam', *options, '--checkpoint', trained[0], *CPU)
    assert all(word in line for word in words), line
    assert not list(pictures.glob('gradcam*'))


@pytest.mark.parametrize('command', ['attention', 'gradcam'])
def test_missing_extra_says_what_to_install(fails, monkeypatch, command):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    line = fails(command, *['a.png'][:command == 'gradcam'], '--model', 'rla_resnet20_cifar', *CPU)
    assert "pip install 'timm_rla[analysis]'" in line


@pytest.mark.parametrize('command, words', [
    (['gradcam', 'a-1.png', '--output', 'a-1.png'], 'is what the command reads'),
    (['gradcam', 'b.png', 'a-1.png', '--output', 'a.png'], 'a-1.png: is what the command reads'),
    (['attention', '--output', 'summary.png'], 'summary.csv: is there, of a training run'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_other_files_stay(fails, trained, image_folder, tmp_path, command, words):
    for name in ('a-1.png', 'b.png'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    (tmp_path / 'summary.csv').write_text('kept')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert words in fails(*command, '--checkpoint', trained[0], '--data-dir', image_folder, *CPU)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
