"""docs/tables.py and the sections that it writes: the tables of measurements."""
import importlib
from pathlib import Path

import pytest

from timm_rla.benchmark import results
from timm_rla.benchmark.allocator import KEEP_FREED
from timm_rla.benchmark.suites import SCALING, SUITES

DOCS = Path(__file__).parents[2] / 'docs'
SETTINGS = ' '.join(f'{name}={value}' for name, value in KEEP_FREED.items())


@pytest.fixture
def tables(monkeypatch):
    """The script, whose modules lie beside it."""
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module('tables')


@pytest.fixture
def speed(tables):
    return tables.speed


def test_the_pages_are_up_to_date(tables):
    assert tables.main(check=True) == 0, 'run python docs/tables.py'


def write(folder, suite, setting, models=None, allocator=f'glibc, {SETTINGS}', **values):
    common = dict(hardware='A CPU', date='2030-01-02', torch='2.14.1+cpu', timm='1.0.31', allocator=allocator)
    results.update(folder / f'benchmark-{suite}.csv', [
        dict(setting.columns(), model=name, ratio=1 - index / 10, ratio_lower=0.5, ratio_upper=1.5,
             memory_ratio=1 + index / 10, **{**common, **values})
        for index, name in enumerate(models or setting.models)])


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_cells_that_are_not_measured_say_so(speed, tmp_path):
    for lines in speed.benchmark(tmp_path), speed.forms(tmp_path), speed.scaling(tmp_path):
        measured = [cell for line in lines[2:] for cell in cells(line)[1:] if '`' not in cell]
        assert set(measured) <= {'not measured', '-'} and 'not measured' in measured
    assert len(speed.benchmark(tmp_path)) == 2 + len({speed.title(s) for s in SUITES['gpu'] + SUITES['cpu']})
    assert len(speed.forms(tmp_path)) == 2 + len(SUITES['forms-gpu'] + SUITES['forms-cpu'])


def test_benchmark(speed, tmp_path):
    by_name = {setting.name: setting for setting in SUITES['cpu']}
    write(tmp_path, 'cpu', by_name['resnet50-train-eager-b32-224px'])
    setting = by_name['resnet18-infer-eager-b1-224px']
    write(tmp_path, 'cpu', setting, setting.models[:3])  # the folded one is missing
    lines = speed.benchmark(tmp_path)
    measured = [cells(line) for line in lines if '(0.500 to 1.500)' in line]
    assert measured == [
        ['CPU, eager, training, batch 32, 224 px', '`resnet50`', '0.900 (0.500 to 1.500)', '0.800 (0.500 to 1.500)',
         '-', '1.100', '1.200'],
        ['CPU, eager, inference, batch 1, 224 px', '`resnet18`', '0.900 (0.500 to 1.500)', '0.800 (0.500 to 1.500)',
         'not measured', '1.100', '1.200'],
    ]
    rest = '|  | `resnet18`, `resnet101` | not measured | not measured | - | not measured | not measured |'
    assert lines.index(rest) == 1 + next(i for i, line in enumerate(lines) if '`resnet50` | 0.900' in line)
    assert lines[-1] == ('Measured on A CPU (2030-01-02; torch 2.14.1, timm 1.0.31; glibc told to keep freed memory '
                         f'({SETTINGS})).')
    assert all('0.9' not in line for line in speed.forms(tmp_path))  # another run, though of the same networks


@pytest.mark.parametrize('allocator, words', [
    ('jemalloc', '1.0.31; jemalloc)'),
    ('glibc', '1.0.31; glibc)'),
    ('glibc, MALLOC_TOP_PAD_=1', '1.0.31; glibc, MALLOC_TOP_PAD_=1)'),
    ('', '1.0.31)'),  # of a GPU
])
def test_allocator_of_the_caption(speed, allocator, words, tmp_path):
    write(tmp_path, 'forms-cpu', SUITES['forms-cpu'][0], allocator=allocator)
    assert speed.forms(tmp_path)[-1] == f'Measured on A CPU (2030-01-02; torch 2.14.1, timm {words}.'


def test_forms(speed, tmp_path):
    setting = SUITES['forms-cpu'][0]
    assert setting.models[2:] == ('rla_resnet50+lstm_called', 'rla_resnet50+general')
    write(tmp_path, 'forms-cpu', setting)
    header, _, *lines = speed.forms(tmp_path)
    line, = (line for line in lines if '(0.500' in line)
    found = dict(zip(cells(header), cells(line)))
    assert found == {
        '': 'CPU, eager, training, batch 32, 224 px',
        'RLA as it runs': '0.900 (0.500 to 1.500)',
        'LSTM called as a module': '0.800 (0.500 to 1.500)',
        'general form': '0.700 (0.500 to 1.500)',
        'folded': '-', 'Triton kernels': '-', 'compiled behind the last convolution': '-',
    }


def test_days_of_the_caption(speed, tmp_path):
    """One machine that measured on two days is named once."""
    for setting, date in zip(SUITES['forms-cpu'], ('2030-01-03', '2030-01-02')):
        write(tmp_path, 'forms-cpu', setting, date=date)
    assert speed.forms(tmp_path)[-1].startswith('Measured on A CPU (2030-01-02 and 2030-01-03; torch 2.14.1')


def test_scaling(speed, tmp_path):
    point = SCALING['scaling-cpu']['batch'][0]
    write(tmp_path, 'scaling-cpu', point.setting)
    line, = (line for line in speed.scaling(tmp_path) if ' %' in line)
    assert cells(line)[2].startswith(f'{point.value}: 11.1 %, ') and cells(line)[2].count('not measured') == 2
    assert speed.scaling(tmp_path)[-1].startswith('Measured on A CPU')


def test_pages(tables, tmp_path, capsys, monkeypatch):
    """Each section goes to its page; one without its marks is an error."""
    with pytest.raises(ValueError, match='README.md: <!-- begin quickstart --> and <!-- end quickstart -->'):
        tables.render('README.md', 'no marks', tables.SECTIONS)
    sections = {'forms': tables.Section('docs/design.md', lambda: tables.speed.forms(tmp_path))}
    text = 'a\n<!-- begin forms -->\nold\n<!-- end forms -->\nb\n'
    new = tables.render('docs/design.md', text, sections)
    assert new.startswith('a\n<!-- begin forms -->\n| ') and new.endswith(' |\n<!-- end forms -->\nb\n')
    assert '\nold' not in new and tables.render('docs/design.md', new, sections) == new
    assert tables.render('other.md', text, sections) == text
    monkeypatch.setattr(tables, 'SECTIONS', sections)
    monkeypatch.setattr(tables, 'ROOT', tmp_path)
    (tmp_path / 'docs').mkdir()
    page = tmp_path / 'docs' / 'design.md'
    page.write_text(text)
    assert tables.main(check=True) == 1 and page.read_text() == text and 'docs/design.md' in capsys.readouterr().err
    assert tables.main(check=False) == 0 and page.read_text() == new
    assert tables.main(check=True) == 0
