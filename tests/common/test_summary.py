"""summary.csv: what is whole is read, whatever else stands there."""
import random

import pytest
from timm.utils import update_summary

from timm_rla.common.errors import UserError
from timm_rla.common.summary import read_summary, trim_summary, write_row

ROWS = [dict(epoch=float(e), train_loss=2.5 - e / 10, eval_loss=2 - e / 10, eval_top1=10. * e, eval_top5=50. + e,
             lr=0.1 / (e + 1)) for e in range(4)]


def test_same_file_as_timm(tmp_path):
    ours, timms = tmp_path / 'ours', tmp_path / 'timm'
    ours.mkdir()
    timms.mkdir()
    for row in ROWS:
        write_row(ours, row)
        train, evaluation = ({key.split('_')[1]: value for key, value in row.items() if key.startswith(prefix)}
                             for prefix in ('train_', 'eval_'))
        update_summary(int(row['epoch']), train, evaluation, str(timms / 'summary.csv'), lr=row['lr'],
                       write_header=row is ROWS[0])
    assert (ours / 'summary.csv').read_bytes() == (timms / 'summary.csv').read_bytes()
    assert read_summary(timms) == ROWS


def text():
    header = ','.join(ROWS[0])
    return [header, *(','.join([str(int(row['epoch'])), *map(str, list(row.values())[1:])]) for row in ROWS)]


@pytest.mark.parametrize('change, expected', [
    (lambda lines: [lines[0], *lines[1:3], lines[0], *lines[3:]], ROWS),  # as timm's script after a resume
    (lambda lines: ['\ufeff' + lines[0], *lines[1:]], ROWS),
    (lambda lines: [*lines[:4], lines[4][:12]], ROWS[:3]),
    (lambda lines: [*lines[:2], lines[1], *lines[2:]], ROWS),
    (lambda lines: [*lines[:3], '7,8', 'nonsense', '', '\0\0', *lines[3:]], ROWS),
    (lambda lines: [lines[0], '-1' + lines[1][1:], '0.5' + lines[1][1:], 'nan' + lines[1][1:], *lines[1:]], ROWS),
    (lambda lines: lines[1:], []),
    (lambda lines: [], []),
], ids=['header twice', 'byte-order mark', 'cut', 'row twice', 'nonsense', 'no epochs', 'no header', 'empty'])
def test_damaged_files(tmp_path, change, expected):
    (tmp_path / 'summary.csv').write_text('\n'.join(change(text())) + '\n', encoding='utf-8')
    assert read_summary(tmp_path) == expected
    trim_summary(tmp_path, 2)
    assert read_summary(tmp_path) == expected[:2]


def test_random_damage(tmp_path):
    """Nothing but rows comes out of it."""
    chance = random.Random(0)
    for _ in range(1000):
        data = bytearray(('\n'.join(text()) + '\n').encode())
        start = data.index(b'\n') + 1
        for _ in range(chance.randint(1, 5)):
            position = chance.randrange(start, len(data))
            data[position:position + chance.randint(0, 9)] = chance.randbytes(chance.randint(0, 9))
        (tmp_path / 'summary.csv').write_bytes(data)
        rows = read_summary(tmp_path)
        assert [row['epoch'] for row in rows] == sorted({row['epoch'] for row in rows})
        assert all(isinstance(value, float) for row in rows for value in row.values())
        assert all(row['epoch'] == int(row['epoch']) for row in rows)


def test_a_row_that_cannot_be_written_leaves_the_others(tmp_path, monkeypatch):
    write_row(tmp_path, ROWS[0])
    before = (tmp_path / 'summary.csv').read_bytes()
    monkeypatch.setattr('os.fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='summary.csv: .*No space left'):
        write_row(tmp_path, ROWS[1])
    assert (tmp_path / 'summary.csv').read_bytes() == before and len(list(tmp_path.iterdir())) == 1
