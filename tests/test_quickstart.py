"""The digits of the quickstart, and the curves at its end."""
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_rla import cli
from timm_rla.quickstart import write_digits


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


SUMMARY = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.3,2.2,10,50,0.1\n1,1.3,1.2,50,90,0.1\n'


@pytest.mark.parametrize('ending', ['png', 'svg', 'pdf'])
def test_curves(tmp_path, capsys, ending):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'summary.csv').write_text(SUMMARY)
    output = tmp_path / f'curves.{ending}'
    assert cli.main(['curves', str(tmp_path / 'a'), str(tmp_path / 'b' / 'summary.csv'), '--output', str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output) and output.stat().st_size > 5000
    if ending == 'svg':
        assert output.read_text().count('<path') > 10


def test_curves_bad_input(tmp_path, capsys):
    (tmp_path / 'summary.csv').write_text(SUMMARY.splitlines()[0] + '\n')
    assert cli.main(['curves', str(tmp_path)]) == 2
    assert 'at least one epoch' in capsys.readouterr().err
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert cli.main(['curves', str(tmp_path), '--output', 'curves.bmp']) == 2
    assert '.png, .svg or .pdf' in capsys.readouterr().err


def test_missing_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert cli.main(['curves', str(tmp_path)]) == 2
    assert "pip install 'timm_rla[analysis]'" in capsys.readouterr().err
