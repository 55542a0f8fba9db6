"""Files that are written: as a whole, through links, and in the place of nothing else."""
import os

import pytest

from timm_rla.common.errors import UserError
from timm_rla.common.files import check_outputs, replacing, writing_text


def test_files_of_others_stay(tmp_path):
    """A file of a similar name, and a link, are as they were."""
    (tmp_path / 'y.csv.tmp').write_text('other')
    (tmp_path / 'link.csv').symlink_to('y.csv')
    for name in ('y.csv', 'link.csv'):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text(name)
    assert (tmp_path / 'y.csv.tmp').read_text() == 'other'
    assert (tmp_path / 'link.csv').is_symlink() and (tmp_path / 'y.csv').read_text() == 'link.csv'
    assert sorted(os.listdir(tmp_path)) == ['link.csv', 'y.csv', 'y.csv.tmp']


def test_text_is_the_same_in_every_locale(tmp_path):
    with writing_text(tmp_path / 'a.csv') as f:
        f.write(os.fsdecode(b'latin\xe9 \xc3\xbc\r\n'))
    assert (tmp_path / 'a.csv').read_bytes() == b'latin\\udce9 \xc3\xbc\r\n'


@pytest.mark.parametrize('outputs, words', [
    (['in.png'], 'is what the command reads'),
    (['link.png'], 'is what the command reads'),
    (['./hard.png'], 'is what the command reads'),
    (['new.csv', 'sub/../new.csv'], 'the same file as'),
    (['summary.csv'], 'of a training run'),
    (['.'], 'is a folder'),
    (['pipe'], 'no plain file'),
    (['in.png/x.csv'], 'in.png is no folder'),
    (['n' * 5000], 'too long'),
    (['n' * 255], 'too long'),
    (['a\0b'], 'null'),
], ids=lambda value: value[-1][:12] if isinstance(value, list) else '')
def test_outputs_in_the_place_of_others(tmp_path, outputs, words):
    (tmp_path / 'in.png').write_text('image')
    (tmp_path / 'link.png').symlink_to('in.png')
    (tmp_path / 'hard.png').hardlink_to(tmp_path / 'in.png')
    (tmp_path / 'summary.csv').write_text('')
    (tmp_path / 'sub').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=words):
        check_outputs([('--output', tmp_path / name) for name in outputs], [tmp_path / 'in.png', ''])
    assert sorted(os.listdir(tmp_path)) == before


def test_outputs(tmp_path):
    check_outputs([('--csv', tmp_path / 'new' / 'a.csv'), ('--json', tmp_path / 'new' / 'a.json')], [tmp_path / 'no'])
    assert not os.listdir(tmp_path / 'new')
