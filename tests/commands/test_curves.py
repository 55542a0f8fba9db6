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
    for text in ('epoch,foo\n0,1\n', 'epoch,train_loss\n0,nan\n', 'epoch,train_loss\n0,1e308\n1,-1e308\n'):
        (tmp_path / 'summary.csv').write_text(text)
        assert cli.main(['curves', str(tmp_path), '--output', str(tmp_path / 'c.png')]) == 2
        assert f'{tmp_path}: no number to draw in the columns train_loss' in capsys.readouterr().err
    assert not (tmp_path / 'c.png').exists()
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,eval_map,lr\n200,1.0,0.5,0.1\n')
    assert cli.main(['curves', str(tmp_path), '--output', str(tmp_path / 'c.png')]) == 2
    assert 'a run of a detector, which has no eval_top1' in capsys.readouterr().err
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert cli.main(['curves', str(tmp_path), '--output', 'curves.bmp']) == 2
    assert '.png, .svg or .pdf' in capsys.readouterr().err


def test_curves_draws_what_it_can(tmp_path, recwarn):
    """Validation at intervals; values that are no numbers or beyond any axis; names that no font has signs for."""
    run = tmp_path / '\u6f22'
    run.mkdir()
    (run / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_top1\n0,1e308,,\n1,inf,1.5,40\n2,2,,\n3,1,1,50\n')
    assert cli.main(['curves', str(run), '--output', str(tmp_path / 'c.svg')]) == 0
    assert (tmp_path / 'c.svg').read_text().count('<path') > 10 and not list(recwarn)


def test_missing_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    assert cli.main(['curves', str(tmp_path)]) == 2
    assert "pip install 'timm_rla[analysis]'" in capsys.readouterr().err
