"""What was run on record, and whether it held."""
from pathlib import Path
from typing import List

from .markdown import NOT_MEASURED, read_rows, table

WORKS = {
    'timm': '`create_model`, `features_only`, Hub names, `train.py`, `validate.py`, `benchmark.py`, `onnx_export.py`, '
            'and timm\'s own model tests (`make test-timm`)',
    'transformers': '`TimmBackbone` / `AutoBackbone`, also inside UperNet and DETR; '
                    '`TimmWrapperForImageClassification`, `AutoModelForImageClassification`',
    'segmentation-models-pytorch': '`tu-rla_resnet50` and the others: Unet, DeepLabV3+; not the CIFAR networks',
    'fastai': '`create_timm_model(\'rla_resnet18\', ...)`, `vision_learner(dls, \'rla_resnet18\')`',
    'torchvision': 'Faster R-CNN on `features_only` and a feature pyramid',
}


def quickstart(results: Path) -> List[str]:
    """What `make quickstart` printed."""
    row = read_rows(results / 'quickstart.csv')[0]
    return [
        f'On {row["hardware"]} it took {row["seconds"]} s after the installation and printed '
        f'{row["top1"]} % top-1 on {row["held_out"]} held-out digits',
        f'({row["date"]}, torch {row["torch"].split("+")[0]}, timm {row["timm"]}).',
    ]


def libraries(results: Path, setup: Path) -> List[str]:
    """Versions that `docs/libraries.py` has tried; `setup` names the oldest timm."""
    tried = {row['library']: row for row in read_rows(results / 'libraries.csv')}
    oldest = next(line.split('>=')[1].strip() for line in setup.read_text().splitlines()
                  if line.strip().startswith('timm >='))
    rows = []
    for name, what in WORKS.items():
        version = tried[name]['version'].split('+')[0]
        rows.append([name, f'{oldest} to {version}' if name == 'timm' else version, what])
    return [*table(['library', 'version', 'what works'], rows), '',
            f'Tried on {max(row["date"] for row in tried.values())} by `python docs/libraries.py`.']


def torture(results: Path) -> List[str]:
    """What `make torture` has tried, and whether it held."""
    path = results / 'torture.csv'
    if not path.is_file():
        return ['Not run to its end yet.']
    rows = read_rows(path)
    last, dates = rows[-1], sorted(row['date'] for row in rows)
    days = ' to '.join(dict.fromkeys([dates[0], dates[-1]]))
    torch = last['torch'].split('+')[0]
    cells = ([row['what'], f'{int(row["tries"]):,}', row['failed']] for row in rows)
    return [*table(['what', 'tries', 'failed'], cells), '',
            f'Run on {days}, Python {last["python"]}, torch {torch}, timm {last["timm"]}.']


def matrix(results: Path) -> List[str]:
    """What `make matrix` has tried."""
    columns = ['python', 'torch', 'timm', 'passed', 'failed', 'skipped', 'date']
    return table(['libraries', 'Python', *columns[1:]], (
        [row['environment'],
         *([row[key].split('+')[0] for key in columns] if row['date'] else [NOT_MEASURED, *['-'] * 6])]
        for row in read_rows(results / 'matrix.csv')))
