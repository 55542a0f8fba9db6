"""`timm-rla validate`: its row of results, and options that reach the loader and the model."""
import csv
import json

import pytest
import torch
from timm.models import create_model

import timm_rla_cli as cli
from timm_rla.common import loaders

TINY = dict(layers=(1, 1, 1))
COLUMNS = ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']


@pytest.fixture
def validate(image_folder, tmp_path, capsys):
    """Validate one and the same network with these options; returns the printed result."""
    torch.manual_seed(0)
    torch.save(create_model('rla_resnet20_cifar', **TINY).state_dict(), tmp_path / 'weights.pth')

    def run(*options, code=0):
        command = ['validate', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--checkpoint',
                   str(tmp_path / 'weights.pth'), '--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
        assert cli.main([*command, *options]) == code
        out, err = capsys.readouterr()
        return err.strip().splitlines()[-1] if code else json.loads(out.split('--result')[1])

    return run


def test_row_of_results(validate, tmp_path):
    """The columns of timm's validate.py; percentages and their complements, parameters in millions."""
    result = validate('--results-file', str(tmp_path / 'a.csv'))
    assert list(result) == COLUMNS
    assert result['top1'] + result['top1_err'] == pytest.approx(100) == result['top5'] + result['top5_err']
    parameters = sum(p.numel() for p in create_model('rla_resnet20_cifar', **TINY).parameters())
    assert result['param_count'] == round(parameters / 1e6, 2)
    assert (result['model'], result['img_size'], result['crop_pct']) == ('rla_resnet20_cifar', 32, 1.0)
    with open(tmp_path / 'a.csv', newline='') as f:
        (row,) = csv.DictReader(f)
    assert row == {key: str(value) for key, value in result.items()}
    validate('--results-file', str(tmp_path / 'a.json'), '--results-format', 'json')
    assert json.loads((tmp_path / 'a.json').read_text()) == result


@pytest.mark.parametrize('options', [
    ['--reparam'], ['--channels-last'], ['--no-prefetcher'], ['--batch-size', '7'], ['--use-train-size'],
    ['--torchcompile', 'eager'],
], ids=' '.join)
def test_ways_to_run_do_not_change_the_result(validate, options):
    assert validate(*options) == validate()


def test_options_of_the_crop_reach_the_loader(validate, monkeypatch):
    calls = []

    def create_loader(*args, original=loaders.create_loader, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(loaders, 'create_loader', create_loader)
    result = validate('--crop-mode', 'border', '--crop-border-pixels', '1', '--crop-pct', '0.5', '--img-size', '16',
                      '--interpolation', 'nearest')
    assert calls[0].items() >= dict(crop_mode='border', crop_border_pixels=1, crop_pct=0.5, input_size=(3, 16, 16),
                                    interpolation='nearest').items()
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (16, 0.5, 'nearest')


@pytest.mark.parametrize('options, words', [
    (['--torchcompile', 'nosuch'], 'nosuch'),
    (['--mean', '0.5', '0.5'], '--mean 0.5 0.5: 2 numbers for 3 channels'),
    (['--use-ema'], 'weights.pth holds no EMA weights'),
    (['--crop-border-pixels', '4'], '--crop-border-pixels 4: leaves nothing of image'),
    (['--interpolation', 'nosuch'], 'nosuch'),
    (['--amp', '--model-dtype', 'bfloat16'], '--amp'),
    (['--num-classes', '5'], 'fc.weight'),
    (['--test-pool'], 'validate.py'),
    (['--confusion', '.'], '--confusion .: the ending must be'),
    (['--confusion', '/'], '--confusion /: the ending must be'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_bad_input(validate, options, words):
    line = validate(*options, code=2)
    assert line.startswith('timm-rla validate: error: ') and words in line, line


def test_results_file_that_cannot_be_written(validate, tmp_path):
    (tmp_path / 'no').write_text('a file')
    assert 'no/a.csv' in validate('--results-file', str(tmp_path / 'no' / 'a.csv'), code=2)


def test_files_are_written_before_anything_is_printed(validate, tmp_path, monkeypatch):
    """Nobody may read it any more."""
    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr('builtins.print', closed)
    monkeypatch.setattr('timm_rla_cli._drop_output', lambda: None)
    validate('--results-file', str(tmp_path / 'a.csv'), '--confusion', str(tmp_path / 'c.png'), code=141)
    assert (tmp_path / 'a.csv').is_file() and (tmp_path / 'c.png').is_file()


def test_confusion_matrix(validate, image_folder, tmp_path):
    result = validate('--confusion', str(tmp_path / 'c.png'))
    with open(tmp_path / 'c-classes.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 10 and sum(int(row['images']) for row in rows) == 30
    assert 100 * sum(int(row['correct']) for row in rows) / 30 == pytest.approx(result['top1'], abs=1e-3)
    assert (tmp_path / 'c.csv').is_file() and (tmp_path / 'c.png').stat().st_size > 10000
    for options, words in ((['--results-file', tmp_path / 'weights.pth'], 'weights.pth: is what the command reads'),
                           (['--results-file', tmp_path / 'd.csv', '--confusion', tmp_path / 'd.png'], 'the same file'),
                           (['--confusion', next((image_folder / 'validation' / '7').iterdir())], 'command reads'),
                           (['--confusion', tmp_path / 'summary.png'], 'summary.csv: is there, of a training run')):
        (tmp_path / 'summary.csv').write_text('kept')
        assert words in validate(*map(str, options), code=2)
    assert (tmp_path / 'summary.csv').read_text() == 'kept'
    assert '.png, .svg or .pdf' in validate('--confusion', 'c.bmp', code=2)
