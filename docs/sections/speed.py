"""Measured speed and memory, from the files `benchmark-SUITE.csv` of a folder of results."""
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Tuple

from timm_rla.benchmark.allocator import KEEP_FREED
from timm_rla.benchmark.results import find, read
from timm_rla.benchmark.suites import FORMS, SCALING, SUITES, Point, Setting, detector_width
from timm_rla.benchmark.variants import is_detector

from .markdown import NOT_APPLICABLE, NOT_MEASURED, table

Row = Dict[str, str]
Found = List[Tuple[Setting, Dict[str, Row]]]  # settings of suites, each with its rows by model

FORM_NAMES = {  # by the suffix of the model
    '': 'RLA as it runs',
    'lstm_called': 'LSTM called as a module',
    'general': 'general form',
    'folded': 'folded',
    'triton': 'Triton kernels',
    'regional': 'compiled behind the last convolution',
}


def benchmark(results: Path) -> List[str]:
    """The suites `gpu` and `cpu`: one row for each setting and depth, one for all depths that are not measured."""
    lines = []
    found = _found(results, ('gpu', 'cpu'))
    for shown in dict.fromkeys(title(setting) for setting, _ in found):
        missing, label = {}, shown  # networks by the cells that they would have
        for setting, rows in found:
            if title(setting) != shown:
                continue
            plain, se, rla, *_ = setting.models
            cells = [_cell(setting, rows, name, _ratio) for name in (se, rla, f'{rla}+folded')]
            cells += [_cell(setting, rows, name, _memory) for name in (se, rla)]
            if rows:
                lines.append([label, f'`{plain}`', *cells])
                label = ''
            else:
                missing.setdefault(tuple(cells), []).append(f'`{plain}`')
        for cells, names in missing.items():
            lines.append([label, ', '.join(names), *cells])
            label = ''
    return table(['', 'network', 'SE', 'RLA', 'RLA, folded', 'memory, SE', 'RLA'], lines) + _machines(found)


def detectors(results: Path) -> List[str]:
    """The suites `detection-*`: one row for each setting."""
    found = _found(results, ('detection-gpu', 'detection-cpu'))
    return table(['', 'detector', 'SE', 'RLA', 'memory, SE', 'RLA'], (
        [title(setting), f'`{setting.models[0]}`',
         *(_cell(setting, rows, name, show) for show in (_ratio, _memory) for name in setting.models[1:])]
        for setting, rows in found)) + _machines(found)


def loading(results: Path) -> List[str]:
    """The suites `loading-*`: training from memory in relation to the bare step."""
    found = _found(results, ('loading-gpu', 'loading-cpu'))
    return table(['', 'network', 'from memory / bare step'], (
        [title(setting), f'`{setting.models[0]}`', _cell(setting, rows, setting.models[1], _ratio)]
        for setting, rows in found)) + _machines(found)


def forms(results: Path) -> List[str]:
    """The suites `forms-*`: images per second of each form of `rla_resnet50`."""
    found = _found(results, FORMS)
    return table(['', *FORM_NAMES.values()], (
        [title(setting), *(_cell(setting, rows, '+'.join(filter(None, (setting.models[1], suffix))), _ratio)
                           for suffix in FORM_NAMES)]
        for setting, rows in found)) + _machines(found)


def scaling(results: Path) -> List[str]:
    """The suites `scaling-*`: time that layer attention adds to a training step."""
    axes = list(next(iter(SCALING.values())))
    rows = []
    for suite, points in SCALING.items():
        measured = _measured(results, suite)
        rows.append([title(points['M'][0].setting), *(_added(measured, points[axis]) for axis in axes)])
    return table(['', *axes], rows) + _machines(_found(results, SCALING))


def title(setting: Setting) -> str:
    """A setting in words, without its networks."""
    device = 'CPU' if setting.device == 'cpu' else 'GPU'
    how = 'compiled' if setting.torchcompile else 'eager'
    mode = {'train': 'training', 'infer': 'inference'}[setting.mode]
    size = setting.img_size
    pixels = f'{detector_width(size)}x{size}' if is_detector(setting.models[0]) else size
    return f'{device}, {how}, {mode}, batch {setting.batch_size}, {pixels} px'


def _measured(results: Path, suite: str) -> List[Row]:
    return read(results / f'benchmark-{suite}.csv')


def _found(results: Path, suites: Iterable[str]) -> Found:
    return [(setting, find(measured, setting)) for suite in suites for measured in [_measured(results, suite)]
            for setting in SUITES[suite]]


def _cell(setting: Setting, rows: Dict[str, Row], model: str, show: Callable[[Row], str]) -> str:
    if model not in setting.models:
        return NOT_APPLICABLE
    return show(rows[model]) if model in rows else NOT_MEASURED


def _ratio(row: Row) -> str:
    return '{ratio:.3f} ({ratio_lower:.3f} to {ratio_upper:.3f})'.format_map(
        {key: float(row[key]) for key in ('ratio', 'ratio_lower', 'ratio_upper')})


def _memory(row: Row) -> str:
    return f'{float(row["memory_ratio"]):.3f}'


def _added(measured: List[Row], points: List[Point]) -> str:
    cells = []
    for value, setting, model in points:
        row = find(measured, setting).get(model)
        cells.append(f'{value}: {100 / float(row["ratio"]) - 100:.1f} %' if row else f'{value}: {NOT_MEASURED}')
    return ', '.join(cells) if any(cell.endswith('%') for cell in cells) else NOT_MEASURED


def _machines(found: Found) -> List[str]:
    dates = {}  # by machine
    for row in (row for _, rows in found for row in rows.values()):
        versions = f'torch {row["torch"].split("+")[0]}, timm {row["timm"]}'
        how = '; '.join(filter(None, (versions, _allocator(row['allocator']))))
        dates.setdefault((row['hardware'], how), set()).add(row['date'])
    machines = [f'{hardware} ({" and ".join(sorted(days))}; {how})' for (hardware, how), days in sorted(dates.items())]
    return ['', f'Measured on {"; ".join(machines)}.'] if machines else []


def _allocator(text: str) -> str:
    """In words; `text` as from `allocator.describe`."""
    settings = ' '.join(f'{name}={value}' for name, value in KEEP_FREED.items())
    return f'glibc told to keep freed memory ({settings})' if text == f'glibc, {settings}' else text
