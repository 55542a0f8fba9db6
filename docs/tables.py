"""Writes the tables of README.md and docs/design.md: counts from the models themselves, measurements from results/.

    python docs/tables.py           # rewrite them
    python docs/tables.py --check   # fail if they are not up to date
"""
import csv
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Tuple

import timm
import torch

import timm_rla  # noqa: F401, registers the models
from timm_rla.benchmark.allocator import KEEP_FREED
from timm_rla.benchmark.results import find, read
from timm_rla.benchmark.suites import FORMS, SCALING, SUITES, Point, Setting, detector_width
from timm_rla.benchmark.variants import is_detector

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {  # prefix of the names: that of the network without layer attention
    'rla_vector_': '',
    'rla_se': 'se',
    'rla_': '',
}
NOT_MEASURED, NOT_APPLICABLE = 'not measured', '-'


def _create(name: str, **kwargs) -> torch.nn.Module:
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _plain_name(name: str) -> str:
    prefix = next(prefix for prefix in FAMILIES if name.startswith(prefix))
    return FAMILIES[prefix] + name.removeprefix(prefix)


def _model_rows(names: List[str]) -> List[str]:
    rows = ['| model | N | M | r | parameters | on top of | extra | % |', '|---|---|---|---|---|---|---|---|']
    for name in names:
        model, plain = _create(name), _create(_plain_name(name))
        total, extra = _count(model), _count(model) - _count(plain)
        fc1 = model.layer1[0].attention.fc1
        cells = [
            f'`{name}`', model.lstm.input_size, model.lstm.hidden_size, fc1.in_features // fc1.out_features,
            f'{total:,}', f'`{_plain_name(name)}`', f'{extra:,}', f'{100 * extra / _count(plain):.2f}',
        ]
        rows.append(f'| {" | ".join(map(str, cells))} |')
    return rows


def models() -> List[str]:
    """ImageNet networks, 1000 classes."""
    return _model_rows([name for name in timm.list_models('rla_*') if not name.endswith('_cifar')])


def cifar_models() -> List[str]:
    """CIFAR networks, 10 classes, depths 20 and 56."""
    return _model_rows([
        f'{family}{depth}_cifar'
        for family in ('rla_resnet', 'rla_seresnet', 'rla_vector_resnet') for depth in (20, 56)
    ])


def quickstart() -> List[str]:
    """What `make quickstart` printed."""
    with open(ROOT / 'results' / 'quickstart.csv') as f:
        row = next(csv.DictReader(f))
    return [
        f'On {row["hardware"]} it took {row["seconds"]} s after the installation and printed '
        f'{row["top1"]} % top-1 on {row["held_out"]} held-out digits',
        f'({row["date"]}, torch {row["torch"].split("+")[0]}, timm {row["timm"]}).',
    ]


def _measured(suite: str) -> List[Dict[str, str]]:
    return read(ROOT / 'results' / f'benchmark-{suite}.csv')


Found = List[Tuple[Setting, Dict[str, Dict[str, str]]]]


def _found(suites: Iterable[str]) -> Found:
    """The settings of some suites, each with its rows by model."""
    return [(setting, find(measured, setting)) for suite in suites for measured in [_measured(suite)]
            for setting in SUITES[suite]]


def _allocator(text: str) -> str:
    """In words; `text` as from `allocator.describe`."""
    settings = ' '.join(f'{name}={value}' for name, value in KEEP_FREED.items())
    return f'glibc told to keep freed memory ({settings})' if text == f'glibc, {settings}' else text


def _machines(rows: Iterable[Dict[str, str]]) -> List[str]:
    machines = {
        f'{row["hardware"]} ({row["date"]}, torch {row["torch"].split("+")[0]}, timm {row["timm"]}'
        f'{row["allocator"] and "; " + _allocator(row["allocator"])})' for row in rows
    }
    return ['', f'Measured on {"; ".join(sorted(machines))}.'] if machines else []


def _machines_of(found: Found) -> List[str]:
    return _machines(row for _, rows in found for row in rows.values())


def _title(setting: Setting) -> str:
    device = 'CPU' if setting.device == 'cpu' else 'GPU'
    how = 'compiled' if setting.torchcompile else 'eager'
    mode = {'train': 'training', 'infer': 'inference'}[setting.mode]
    size = setting.img_size
    pixels = f'{detector_width(size)}x{size}' if is_detector(setting.models[0]) else size
    return f'{device}, {how}, {mode}, batch {setting.batch_size}, {pixels} px'


def _ratio(row: Dict[str, str]) -> str:
    return '{ratio:.3f} ({ratio_lower:.3f} to {ratio_upper:.3f})'.format_map(
        {key: float(row[key]) for key in ('ratio', 'ratio_lower', 'ratio_upper')})


def _memory(row: Dict[str, str]) -> str:
    return f'{float(row["memory_ratio"]):.3f}'


def _cell(setting: Setting, rows: Dict[str, Dict[str, str]], model: str, show: Callable[[Dict[str, str]], str]) -> str:
    if model not in setting.models:
        return NOT_APPLICABLE
    return show(rows[model]) if model in rows else NOT_MEASURED


def _line(cells: Iterable[str]) -> str:
    return f'| {" | ".join(cells)} |'


def benchmark() -> List[str]:
    """The suites `gpu` and `cpu`: one row for each setting and depth, one for all depths that are not measured."""
    lines = ['| | network | SE | RLA | RLA, folded | memory, SE | RLA |', '|---|---|---|---|---|---|---|']
    used = []
    for suite in ('gpu', 'cpu'):
        measured = _measured(suite)
        for title in dict.fromkeys(map(_title, SUITES[suite])):
            missing, label = {}, title  # networks by the cells that they would have
            for setting in (setting for setting in SUITES[suite] if _title(setting) == title):
                plain, se, rla, *_ = setting.models
                rows = find(measured, setting)
                cells = [_cell(setting, rows, name, _ratio) for name in (se, rla, f'{rla}+folded')]
                cells += [_cell(setting, rows, name, _memory) for name in (se, rla)]
                if not rows:
                    missing.setdefault(tuple(cells), []).append(f'`{plain}`')
                    continue
                used += rows.values()
                lines.append(_line([label, f'`{plain}`', *cells]))
                label = ''
            for cells, names in missing.items():
                lines.append(_line([label, ', '.join(names), *cells]))
    return lines + _machines(used)


def detectors() -> List[str]:
    """The suites `detection-*`: one row for each setting."""
    lines = ['| | detector | SE | RLA | memory, SE | RLA |', '|---|---|---|---|---|---|']
    found = _found(('detection-gpu', 'detection-cpu'))
    for setting, rows in found:
        cells = [_cell(setting, rows, name, show) for show in (_ratio, _memory) for name in setting.models[1:]]
        lines.append(_line([_title(setting), f'`{setting.models[0]}`', *cells]))
    return lines + _machines_of(found)


def loading() -> List[str]:
    """The suites `loading-*`: training from memory in relation to the bare step."""
    lines = ['| | network | from memory / bare step |', '|---|---|---|']
    found = _found(('loading-gpu', 'loading-cpu'))
    for setting, rows in found:
        bare, loaded = setting.models
        lines.append(_line([_title(setting), f'`{bare}`', _cell(setting, rows, loaded, _ratio)]))
    return lines + _machines_of(found)


FORM_NAMES = {  # by the suffix of the model
    '': 'RLA as it runs',
    'lstm_called': 'LSTM called as a module',
    'general': 'general form',
    'folded': 'folded',
    'triton': 'Triton kernels',
    'regional': 'compiled behind the last convolution',
}


def forms() -> List[str]:
    """The suites `forms-*`: images per second of each form of `rla_resnet50`."""
    lines = [_line(['', *FORM_NAMES.values()]), '|---' * (len(FORM_NAMES) + 1) + '|']
    found = _found(FORMS)
    for setting, rows in found:
        names = ['+'.join([setting.models[1], *[suffix] * bool(suffix)]) for suffix in FORM_NAMES]
        lines.append(_line([_title(setting), *(_cell(setting, rows, name, _ratio) for name in names)]))
    return lines + _machines_of(found)


def _scaling_cell(points: List[Point], measured: List[Dict[str, str]]) -> str:
    cells = []
    for value, setting, model in points:
        row = find(measured, setting).get(model)
        cells.append(f'{value}: {100 / float(row["ratio"]) - 100:.1f} %' if row else f'{value}: {NOT_MEASURED}')
    return ', '.join(cells) if any(cell.endswith('%') for cell in cells) else NOT_MEASURED


def scaling() -> List[str]:
    """The suites `scaling-*`: time that layer attention adds to a training step."""
    axes = list(next(iter(SCALING.values())))
    lines = [_line(['', *axes]), '|---' * (len(axes) + 1) + '|']
    used = []
    for suite, points in SCALING.items():
        measured = _measured(suite)
        used += (row for setting in SUITES[suite] for row in find(measured, setting).values())
        lines.append(_line([
            _title(points['M'][0].setting), *(_scaling_cell(points[axis], measured) for axis in axes)]))
    return lines + _machines(used)


WORKS = {
    'timm': '`create_model`, `features_only`, Hub names, `train.py`, `validate.py`, `benchmark.py`, `onnx_export.py`, '
            'and timm\'s own model tests (`make test-timm`)',
    'transformers': '`TimmBackbone` / `AutoBackbone`, also inside UperNet and DETR; '
                    '`TimmWrapperForImageClassification`, `AutoModelForImageClassification`',
    'segmentation-models-pytorch': '`tu-rla_resnet50` and the others: Unet, DeepLabV3+; not the CIFAR networks',
    'fastai': '`create_timm_model(\'rla_resnet18\', ...)`, `vision_learner(dls, \'rla_resnet18\')`',
    'torchvision': 'Faster R-CNN on `features_only` and a feature pyramid',
}


def libraries() -> List[str]:
    """Versions that `docs/libraries.py` has tried."""
    with open(ROOT / 'results' / 'libraries.csv', newline='') as f:
        tried = {row['library']: row for row in csv.DictReader(f)}
    oldest = next(line.split('>=')[1].strip() for line in (ROOT / 'setup.cfg').read_text().splitlines()
                  if line.strip().startswith('timm >='))
    lines = [_line(['library', 'version', 'what works']), '|---|---|---|']
    for name, what in WORKS.items():
        version = tried[name]['version'].split('+')[0]
        lines.append(_line([name, f'{oldest} to {version}' if name == 'timm' else version, what]))
    return [*lines, '', f'Tried on {max(row["date"] for row in tried.values())} by `python docs/libraries.py`.']


EVIDENCE = ROOT / 'results' / 'cifar10-depth20'
DETECTORS = ROOT / 'results' / 'bccd-depth18'


def _cells(folder: Path, metric: str) -> Dict[str, Dict[str, str]]:
    """A row of a report for each network that has one, by its key."""
    with open(folder / 'report.csv', newline='') as f:
        return {row['cell']: row for row in csv.DictReader(f) if row['metric'] == metric}


def _figures(row: Dict[str, str]) -> List[str]:
    """Mean and standard deviation, seeds, difference and interval."""
    mean, difference = NOT_MEASURED, '-'
    if row['mean']:
        mean = f'{float(row["mean"]):.2f}' + (f' ± {float(row["std"]):.2f}' if row['std'] else '')
    if row['lower']:
        difference = '{:+.2f} ({:+.2f} to {:+.2f})'.format(
            *(float(row[key]) for key in ('difference', 'lower', 'upper')))
    return [mean, row['n'], difference]


def accuracy() -> List[str]:
    """Errors of the networks of `EVIDENCE` that have runs, beside the paper's, and differences from the plain one."""
    lines = [
        _line(['network', 'top-1 error, %', 'seeds', 'minus plain, paired by seed', 'paper']),
        '|---|---|---|---|---|',
    ]
    return lines + [_line([f'`{row["model"]}`', *_figures(row), row['paper'] or '-'])
                    for row in _cells(EVIDENCE, 'error').values() if row['mean']]


def detector_accuracy() -> List[str]:
    """The same of the detectors of `DETECTORS`, in both metrics."""
    lines = [
        _line(['backbone', 'mAP@[.5,.95], %', 'seeds', 'minus plain, paired by seed', 'mAP@.5, %', 'seeds',
               'minus plain']),
        '|---|---|---|---|---|---|---|',
    ]
    large = _cells(DETECTORS, 'map_50')
    return lines + [_line([f'`{row["model"]}`', *_figures(row), *_figures(large[key])])
                    for key, row in _cells(DETECTORS, 'map').items()]


def _verdict(name: str, plain_name: str, row: Dict[str, str], plain: Dict[str, str], sign: int) -> str:
    """The rule of docs/evidence.md and docs/detection.md, applied to a network; `sign` is -1 if lower is better."""
    if not row.get('lower'):
        return f'- **{name} against {plain_name}:** {NOT_MEASURED}.'
    difference, lower, upper = (float(row[column]) for column in ('difference', 'lower', 'upper'))
    worst, best = sorted((sign * lower, sign * upper))
    verdict = 'it helps' if worst > 0 else 'it hurts' if best < 0 else 'these runs cannot tell'
    text = f'- **{name} against {plain_name}: {verdict}.** {difference:+.2f} points, {lower:+.2f} to {upper:+.2f}, ' \
           f'n = {row["pairs"]}.'
    if row['paper']:
        text += f' The paper has {float(row["paper"]) - float(plain["paper"]):+.2f}.'
    return text


QUESTIONS = {'rla': 'RLA-20', 'se': 'SE-20', 'rla_vector': 'RLA-vector-20', 'ia_rla': 'IA+RLA-20'}


def answer() -> List[str]:
    """For each network of `EVIDENCE`."""
    cells = _cells(EVIDENCE, 'error')
    return [_verdict(name, 'ResNet-20', cells.get(key, {}), cells['plain'], -1) for key, name in QUESTIONS.items()]


def detector_answer() -> List[str]:
    """For each network of `DETECTORS`, in both metrics."""
    lines = []
    for metric, text in (('map', 'mAP@[.5,.95]'), ('map_50', 'mAP@.5')):
        cells = _cells(DETECTORS, metric)
        lines += [_verdict(f'{name}, {text},', 'ResNet-18', cells[key], cells['plain'], 1)
                  for key, name in (('rla', 'RLA-18'), ('se', 'SE-18'))]
    return lines


def report(folder: Path) -> List[str]:
    """The report of a table, as `timm-rla reproduce` writes it, below a heading of the page."""
    title, *lines = (folder / 'report.md').read_text().splitlines()
    return [f'*{title.removeprefix("# ")}*', *(f'#{line}' if line.startswith('##') else line for line in lines)]


def torture() -> List[str]:
    """What `make torture` has tried, and whether it held."""
    path = ROOT / 'results' / 'torture.csv'
    if not path.is_file():
        return ['Not run to its end yet.']
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    lines = [_line(['what', 'tries', 'failed']), '|---|---|---|']
    lines += [_line([row['what'], f'{int(row["tries"]):,}', row['failed']]) for row in rows]
    last = rows[-1]
    return [*lines, '', f'Run on {last["date"]}, Python {last["python"]}, torch {last["torch"].split("+")[0]}, '
                        f'timm {last["timm"]}.']


def matrix() -> List[str]:
    """What `make matrix` has tried."""
    with open(ROOT / 'results' / 'matrix.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    lines = [_line(['libraries', 'Python', 'torch', 'timm', 'passed', 'failed', 'skipped', 'date']), '|---' * 8 + '|']
    for row in rows:
        cells = [row[key].split('+')[0] for key in ('python', 'torch', 'timm', 'passed', 'failed', 'skipped', 'date')]
        lines.append(_line([row['environment'], *(cells if row['date'] else [NOT_MEASURED, *['-'] * 6])]))
    return lines


class Section(NamedTuple):
    """What stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    page: str  # file, from the root of the repository
    lines: Callable[[], List[str]]


SECTIONS: Dict[str, Section] = {
    'quickstart': Section('README.md', quickstart),
    'accuracy': Section('README.md', accuracy),
    'answer': Section('docs/evidence.md', answer),
    'loading': Section('docs/evidence.md', loading),
    'report': Section('docs/evidence.md', lambda: report(EVIDENCE)),
    'models': Section('README.md', models),
    'cifar models': Section('README.md', cifar_models),
    'benchmark': Section('README.md', benchmark),
    'scaling': Section('README.md', scaling),
    'libraries': Section('README.md', libraries),
    'forms': Section('docs/design.md', forms),
    'detector accuracy': Section('README.md', detector_accuracy),
    'detector report': Section('docs/detection.md', lambda: report(DETECTORS)),
    'detector answer': Section('docs/detection.md', detector_answer),
    'detectors': Section('docs/detection.md', detectors),
    'torture': Section('docs/reliability.md', torture),
    'matrix': Section('docs/reliability.md', matrix),
}


def render(page: str, text: str) -> str:
    """Text of a page with its sections written anew.

    Raises:
        ValueError: A section's marks are not there, once each and in this order.
    """
    for name, section in SECTIONS.items():
        if section.page == page:
            begin, end = f'<!-- begin {name} -->\n', f'<!-- end {name} -->'
            if text.count(begin) != 1 or text.split(begin)[1].count(end) != 1:
                raise ValueError(f'{page}: {begin.strip()} and {end} must be there, once each')
            head, rest = text.split(begin)
            text = head + begin + '\n'.join([*section.lines(), end]) + rest.split(end)[1]
    return text


def main() -> int:
    """Write the pages or, with --check, only compare them; returns the exit code."""
    differ = []
    for page in dict.fromkeys(section.page for section in SECTIONS.values()):
        path = ROOT / page
        text = path.read_text()
        new = render(page, text)
        if new != text:
            differ.append(page)
            if '--check' not in sys.argv:
                path.write_text(new)
    if differ and '--check' in sys.argv:
        print(f'not up to date: {", ".join(differ)}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
