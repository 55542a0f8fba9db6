"""`timm-rla quickstart`: its digits are those of scikit-learn, and what it prints is what it trained."""
import csv
import os
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import timm_rla_cli as cli
from timm_rla.commands.quickstart import write_digits
from timm_rla.common.summary import read_summary


def test_digits_are_those_of_scikit_learn(digits):
    images, labels = load_digits(return_X_y=True)
    found = {path.stem: path for path in digits.rglob('*.png')}
    assert len(found) == len(labels) == 1797
    for index in range(0, 1797, 50):
        path = found[f'{index:04d}']
        assert path.parent.name == str(labels[index])
        assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - images[index].reshape(8, 8)).max() < 0.05
    held_out = Counter(path.parent.name for path in (digits / 'validation').rglob('*.png'))
    assert sum(held_out.values()) == 360 and set(held_out.values()) <= set(range(34, 39))  # each class alike


def test_digits_are_written_once(digits):
    times = {path: path.stat().st_mtime_ns for path in digits.rglob('*.png')}
    assert write_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob('*.png')} == times


@pytest.mark.parametrize('options, words', [
    (['--val-split', ''], "--val-split '': must be validation"),
    (['--output', 'file'], '--output file: is no folder'),
    (['--result', 'file/x.csv'], '--result file/x.csv: '),
    (['--epochs', '0'], '--epochs 0: must be at least 1'),
    (['--output', '.', '--result', 'run/last.pth.tar'], 'last.pth.tar: must lie outside of the folders in --output .'),
    (['--output', '/proc/x'], '/proc/x'),
    (['--data-dir', '.'], '--data-dir, --dataset, --class-map: not for quickstart'),
    (['--class-map', 'm.txt'], '--data-dir, --dataset, --class-map: not for quickstart'),
    (['--experiment', 'digits/run'], '--experiment digits/run: the images lie there'),
    (['photos'], 'DIR photos: not for quickstart'),
    (['--config', 'nope'], '--config nope: neither a file nor a recipe'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_bad_input_is_said_before_the_work(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    assert cli.main(['quickstart', *options]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1] and os.listdir(tmp_path) == ['file']


def test_what_the_curve_needs_is_asked_for_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert cli.main(['quickstart']) == 2
    assert "pip install 'timm_rla[quickstart]'" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_quickstart(digits, tmp_path, capsys):
    """What it prints and writes is what the last epoch of its run measured."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'digits').symlink_to(digits)
    (tmp_path / 'recipe.yaml').write_text('model: rla_resnet20_cifar\nmodel_kwargs: {layers: [1, 1, 1]}\nimg_size: 8\n')
    options = ['--device', 'cpu', '--workers', '0', '--epochs', '2', '--val-interval', '5', '--experiment', 'run']
    assert cli.main(['quickstart', '--config', str(tmp_path / 'recipe.yaml'), '--output', str(tmp_path / 'out'),
                     '--result', str(tmp_path / 'result.csv'), *options]) == 0
    out = capsys.readouterr().out
    run = tmp_path / 'out' / 'run'
    (row,) = read_summary(run)
    assert f'{row["eval_top1"]:.2f} % of 360 held-out digits after 2 epochs' in out
    assert f'{run / "last.pth.tar"}' in out and (run / 'curves.png').stat().st_size > 5000
    with open(tmp_path / 'result.csv', newline='') as f:
        (result,) = csv.DictReader(f)
    assert float(result['top1']) == round(row['eval_top1'], 2)
    assert (result['epochs'], result['held_out']) == ('2', '360') and 'threads' in result['hardware']
