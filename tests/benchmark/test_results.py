"""The table of results."""
from dataclasses import replace

import pytest
from tiny_benchmark import TINY, rows_of

from timm_rla.benchmark import results


def test_rows_of_the_same_setting_are_replaced(tmp_path):
    path = tmp_path / 'new' / 'table.csv'
    results.check_output(path)
    assert not path.exists() and not any(path.parent.iterdir())

    def rows(ratio, **changes):
        setting = replace(TINY, **changes)
        return [dict(setting.columns(), model=name, ratio=ratio, hardware='x', date='2020-01-01')
                for name in setting.models]

    results.update(path, rows(1))
    results.update(path, rows(2, batch_size=4))
    results.update(path, rows(3, mode='train'))
    results.update(path, rows(4))
    results.update(path, [dict(row, hardware='y', date='2020-01-02') for row in rows(5, batch_size=4)])
    assert list(rows_of(path)[0]) == list(results.COLUMNS)
    assert [row['ratio'] for row in rows_of(path)] == ['4', '4', '2', '2', '3', '3', '5', '5']
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = results.find(results.read(path), replace(TINY, batch_size=4))
    assert {name: row['ratio'] for name, row in found.items()} == dict.fromkeys(TINY.models, '5')  # the latest
    assert not results.find(results.read(path), replace(TINY, batch_size=8))


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'table.csv'
    results.update(path, [dict(TINY.columns(), model='a')])
    before = path.read_bytes()

    def interrupted(file):
        file.write('half')
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_rla.common.files.csv.writer', interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.update(path, [dict(TINY.columns(), model='b')])
    assert path.read_bytes() == before
