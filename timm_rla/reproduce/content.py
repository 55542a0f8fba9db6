"""What the YAML file of a table holds, read and checked: a table of this package, or one of a user's own."""
import re
from importlib import resources
from pathlib import Path
from typing import Any, Dict

from ..common.errors import UserError, closest
from ..common.yaml_files import read_mapping
from .tasks import DATASETS, TASKS

__all__ = ['TABLES', 'read_table']

TABLES = ('table1', 'table2', 'table2-imagenet', 'table2-coco', 'table3', 'bccd')
KEYS = {'title': str, 'task': str, 'depths': list, 'datasets': list, 'cells': dict}
CELL_KEYS = {'name': str, 'model': str, 'model_kwargs': dict, 'options': dict, 'paper': dict}
OPTIONAL = {'task', 'model_kwargs', 'options', 'paper'}
FIELDS = {'depth': 0, 'depths': ''}  # what may stand in braces


def read_table(name: str) -> Dict[str, Any]:
    """Content of a table's file.

    Args:
        name: One of `TABLES`, or path of a YAML file. A file wins.

    Raises:
        UserError: Neither, or a file that does not hold a table.
    """
    path, source = Path(name), f'TABLE {name}'
    if not path.is_file():
        if name not in TABLES:
            raise UserError(f'{source}: neither a file nor a table; tables are {", ".join(TABLES)}; '
                            f'{closest(name, TABLES)}')
        path = Path(str(resources.files(f'{__package__}.tables').joinpath(f'{name}.yaml')))
    content = read_mapping(path, source)
    _check_keys(content, KEYS, source)
    content.setdefault('task', 'classification')
    _check_choice(content['task'], TASKS, f'{source}: task')
    for depth in content['depths']:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise UserError(f'{source}: depths: {depth!r} is not a number from 1')
    for dataset in content['datasets']:
        _check_choice(dataset, DATASETS, f'{source}: datasets')
    if 'plain' not in content['cells']:
        raise UserError(f'{source}: cells: none is named plain, the network that the others are compared with')
    for key, cell in content['cells'].items():
        subject = f'{source}: cells: {key}'
        if not isinstance(key, str) or not re.fullmatch(r'\w+', key):  # part of a folder's name
            raise UserError(f'{subject}: a name of letters, digits and _ is needed')
        if not isinstance(cell, dict):
            raise UserError(f'{subject}: not a mapping of {", ".join(CELL_KEYS)}')
        _check_keys(cell, CELL_KEYS, subject)
        _check_text(cell['model'], f'{subject}: model')
        _check_text(cell['name'], f'{subject}: name')
        _check_paper(cell.get('paper', {}), subject)
    _check_text(content['title'], f'{source}: title')
    return content


def _check_keys(content: Dict[Any, Any], kinds: Dict[str, type], source: str) -> None:
    for key in content:
        if key not in kinds:
            raise UserError(f'{source}: {key}: no such key; {closest(str(key), kinds)}')
    for key, kind in kinds.items():
        if key not in content and key not in OPTIONAL:
            raise UserError(f'{source}: {key}: missing')
        if key in content and (not isinstance(content[key], kind) or not content[key]):
            raise UserError(f'{source}: {key}: {content[key]!r} is not a {kind.__name__} with something in it')


def _check_choice(value: Any, known: Dict[str, Any], subject: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise UserError(f'{subject}: {value!r} is not one of {", ".join(known)}')


def _check_text(text: str, subject: str) -> None:
    """Complain of braces that hold something else than `FIELDS`."""
    try:
        text.format(**FIELDS)
    except (AttributeError, LookupError, ValueError) as e:
        raise UserError(f'{subject}: {text!r}: only {{depth}} can stand in braces') from e


def _check_paper(paper: Dict[Any, Any], subject: str) -> None:
    """Complain of figures that are no numbers: by depth, then by data set or as 'params', then maybe by metric."""
    for figures in paper.values():
        numbers = list(figures.values()) if isinstance(figures, dict) else [figures]
        numbers = [n for number in numbers for n in (number.values() if isinstance(number, dict) else [number])]
        for number in numbers:
            if not isinstance(figures, dict) or not isinstance(number, (int, float)) or isinstance(number, bool):
                raise UserError(f'{subject}: paper: {number!r} is no number of a data set of a depth')
