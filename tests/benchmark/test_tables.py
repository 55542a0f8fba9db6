"""docs/tables.py: the tables of measurements."""
import importlib.util
from pathlib import Path

import pytest

from timm_rla.benchmark import results
from timm_rla.benchmark.allocator import KEEP_FREED
from timm_rla.benchmark.suites import SCALING, SUITES

PATH = Path(__file__).parents[2] / 'docs' / 'tables.py'
SETTINGS = ' '.join(f'{name}={value}' for name, value in KEEP_FREED.items())


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The script, with results of its own."""
    spec = importlib.util.spec_from_file_location('tables', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    (tmp_path / 'results').mkdir()
    return module


def write(tables, suite, setting, models=None, allocator=f'glibc, {SETTINGS}', **values):
    common = dict(hardware='A CPU', date='2030-01-02', torch='2.14.1+cpu', timm='1.0.31', allocator=allocator)
    results.update(tables.ROOT / 'results' / f'benchmark-{suite}.csv', [
        dict(setting.columns(), model=name, ratio=1 - index / 10, ratio_lower=0.5, ratio_upper=1.5,
             memory_ratio=1 + index / 10, **common, **values)
        for index, name in enumerate(models or setting.models)])


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_cells_that_are_not_measured_say_so(tables):
    for lines in tables.benchmark(), tables.forms(), tables.scaling():
        measured = [cell for line in lines[2:] for cell in cells(line)[1:] if '`' not in cell]
        assert set(measured) <= {'not measured', '-'} and 'not measured' in measured
    assert len(tables.benchmark()) == 2 + len({tables._title(s) for s in SUITES['gpu'] + SUITES['cpu']})
    assert len(tables.forms()) == 2 + len(SUITES['forms-gpu'] + SUITES['forms-cpu'])


def test_benchmark(tables):
    by_name = {setting.name: setting for setting in SUITES['cpu']}
    write(tables, 'cpu', by_name['resnet50-train-eager-b32-224px'])
    setting = by_name['resnet18-infer-eager-b1-224px']
    write(tables, 'cpu', setting, setting.models[:3])  # the folded one is missing
    lines = tables.benchmark()
    measured = [cells(line) for line in lines if '(0.500 to 1.500)' in line]
    assert measured == [
        ['CPU, eager, training, batch 32, 224 px', '`resnet50`', '0.900 (0.500 to 1.500)', '0.800 (0.500 to 1.500)',
         '-', '1.100', '1.200'],
        ['CPU, eager, inference, batch 1, 224 px', '`resnet18`', '0.900 (0.500 to 1.500)', '0.800 (0.500 to 1.500)',
         'not measured', '1.100', '1.200'],
    ]
    rest = '|  | `resnet18`, `resnet101` | not measured | not measured | - | not measured | not measured |'
    assert lines.index(rest) == 1 + next(i for i, line in enumerate(lines) if '`resnet50` | 0.900' in line)
    assert lines[-1] == ('Measured on A CPU (2030-01-02, torch 2.14.1, timm 1.0.31; glibc told to keep freed memory '
                         f'({SETTINGS})).')
    assert all('0.9' not in line for line in tables.forms())  # another run, though of the same networks


@pytest.mark.parametrize('allocator, words', [
    ('jemalloc', '1.0.31; jemalloc)'),
    ('glibc', '1.0.31; glibc)'),
    ('glibc, MALLOC_TOP_PAD_=1', '1.0.31; glibc, MALLOC_TOP_PAD_=1)'),
    ('', '1.0.31)'),  # of a GPU
])
def test_allocator_of_the_caption(tables, allocator, words):
    write(tables, 'forms-cpu', SUITES['forms-cpu'][0], allocator=allocator)
    assert tables.forms()[-1] == f'Measured on A CPU (2030-01-02, torch 2.14.1, timm {words}.'


def test_forms(tables):
    setting = SUITES['forms-cpu'][0]
    assert setting.models[2:] == ('rla_resnet50+lstm_called', 'rla_resnet50+general')
    write(tables, 'forms-cpu', setting)
    header, _, *lines = tables.forms()
    line, = (line for line in lines if '(0.500' in line)
    found = dict(zip(cells(header), cells(line)))
    assert found == {
        '': 'CPU, eager, training, batch 32, 224 px',
        'RLA as it runs': '0.900 (0.500 to 1.500)',
        'LSTM called as a module': '0.800 (0.500 to 1.500)',
        'general form': '0.700 (0.500 to 1.500)',
        'folded': '-', 'Triton kernels': '-', 'compiled behind the last convolution': '-',
    }


def test_scaling(tables):
    point = SCALING['scaling-cpu']['batch'][0]
    write(tables, 'scaling-cpu', point.setting)
    line, = (line for line in tables.scaling() if ' %' in line)
    assert cells(line)[2].startswith(f'{point.value}: 11.1 %, ') and cells(line)[2].count('not measured') == 2
    assert tables.scaling()[-1].startswith('Measured on A CPU')


def test_pages(tables, capsys, monkeypatch):
    """Each section goes to its page; one without its marks is an error."""
    with pytest.raises(ValueError, match='README.md: <!-- begin quickstart --> and <!-- end quickstart -->'):
        tables.render('README.md', 'no marks')
    text = 'a\n<!-- begin forms -->\nold\n<!-- end forms -->\nb\n'
    new = tables.render('docs/design.md', text)
    assert new.startswith('a\n<!-- begin forms -->\n| ') and new.endswith(' |\n<!-- end forms -->\nb\n')
    assert '\nold' not in new and tables.render('docs/design.md', new) == new
    assert tables.render('other.md', text) == text
    monkeypatch.setattr(tables, 'SECTIONS', {'forms': tables.SECTIONS['forms']})
    (tables.ROOT / 'docs').mkdir()
    page = tables.ROOT / 'docs' / 'design.md'
    page.write_text(text)
    monkeypatch.setattr(tables.sys, 'argv', ['tables.py', '--check'])
    assert tables.main() == 1 and page.read_text() == text and 'docs/design.md' in capsys.readouterr().err
    monkeypatch.setattr(tables.sys, 'argv', ['tables.py'])
    assert tables.main() == 0 and page.read_text() == new
