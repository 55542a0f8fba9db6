"""Writes the tables of README.md: counts from the models themselves, measurements from the files under results/.

    python docs/tables.py           # rewrite them
    python docs/tables.py --check   # fail if they are not up to date
"""
import csv
import sys
from pathlib import Path
from typing import Callable, Dict, List

import timm
import torch

import timm_rla  # noqa: F401, registers the models
from timm_rla.benchmark.results import find, read
from timm_rla.benchmark.suites import SCALING, SUITES, Point, Setting

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {  # prefix of the names: that of the network without layer attention
    'rla_vector_': '',
    'rla_se': 'se',
    'rla_': '',
}


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


def _measured() -> List[Dict[str, str]]:
    return [row for path in sorted((ROOT / 'results').glob('benchmark-*.csv')) for row in read(path)]


def _machines(rows: List[Dict[str, str]]) -> List[str]:
    machines = sorted({
        f'{row["hardware"]} ({row["date"]}, torch {row["torch"].split("+")[0]}, timm {row["timm"]})' for row in rows
    })
    return ['', f'Measured on {"; ".join(machines)}.'] if machines else []


def _title(setting: Setting) -> str:
    device = 'CPU' if setting.device == 'cpu' else 'GPU'
    how = 'compiled' if setting.torchcompile else 'eager'
    mode = {'train': 'training', 'infer': 'inference'}[setting.mode]
    return f'{device}, {how}, {mode}, batch {setting.batch_size}, {setting.img_size} px'


def _ratio(row: Dict[str, str]) -> str:
    return '{ratio:.3f} ({ratio_lower:.3f} to {ratio_upper:.3f})'.format_map(
        {key: float(row[key]) for key in ('ratio', 'ratio_lower', 'ratio_upper')}) if row else ''


def benchmark() -> List[str]:
    """The suites `gpu` and `cpu`: one row for each setting and depth, one for all depths that are not measured."""
    measured, used = _measured(), []
    lines = ['| | network | SE | RLA | RLA, folded | memory, SE | RLA |', '|---|---|---|---|---|---|---|']
    settings = SUITES['gpu'] + SUITES['cpu']
    for title in dict.fromkeys(map(_title, settings)):
        label, missing = title, []
        for setting in settings:
            if _title(setting) != title:
                continue
            plain, se, rla, *folded = setting.models
            rows = find(measured, setting)
            if se not in rows or rla not in rows:
                missing.append(f'`{plain}`')
                continue
            used += rows.values()
            cells = [
                label, f'`{plain}`', *(_ratio(rows.get(name, {})) for name in (se, rla, *(folded or ['']))),
                *(f'{float(rows[name]["memory_ratio"]):.3f}' for name in (se, rla)),
            ]
            lines.append(f'| {" | ".join(cells)} |')
            label = ''
        if missing:
            lines.append(f'| {label} | {", ".join(missing)} | not measured | | | | |')
    return lines + _machines(used)


def _scaling_cell(points: List[Point], measured: List[Dict[str, str]]) -> str:
    cells = []
    for value, setting, model in points:
        row = find(measured, setting).get(model)
        cells.append(f'{value}: {100 / float(row["ratio"]) - 100:.1f} %' if row else f'{value}: not measured')
    return ', '.join(cells) if any(cell.endswith('%') for cell in cells) else 'not measured'


def scaling() -> List[str]:
    """The suites `scaling-*`: time that layer attention adds to a training step."""
    measured = _measured()
    axes = list(next(iter(SCALING.values())))
    lines = [f'| | {" | ".join(axes)} |', '|---' * (len(axes) + 1) + '|']
    for points in SCALING.values():
        setting = points['M'][0].setting
        cells = [_title(setting), *(_scaling_cell(points[axis], measured) for axis in axes)]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


SECTIONS: Dict[str, Callable[[], List[str]]] = {
    'quickstart': quickstart,
    'models': models,
    'cifar models': cifar_models,
    'benchmark': benchmark,
    'scaling': scaling,
}


def render(text: str) -> str:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, for each section."""
    for name, lines in SECTIONS.items():
        begin, end = f'<!-- begin {name} -->\n', f'<!-- end {name} -->'
        head, rest = text.split(begin)
        text = head + begin + '\n'.join(lines()) + '\n' + end + rest.split(end)[1]
    return text


def main() -> int:
    path = ROOT / 'README.md'
    text = path.read_text()
    new = render(text)
    if '--check' in sys.argv:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main())
