"""`timm-rla curves`: a picture in each format, and bad input in one line."""
import sys

import pytest

import timm_rla_cli as cli

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
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert cli.main(['curves', str(tmp_path)]) == 2
    assert "pip install 'timm_rla[analysis]'" in capsys.readouterr().err
