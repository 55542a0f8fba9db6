"""What the YAML file of a table holds, read and checked: a table of this package, or one of a user's own."""
import re
import string
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Sequence

from ..common.errors import UserError, blame, closest
from ..common.trained import is_count, is_number
from ..common.yaml_files import read_mapping
from .tasks import DATASETS, TASKS, Task

__all__ = ['GIVEN', 'TABLES', 'read_table']

TABLES = ('table1', 'table2', 'table2-imagenet', 'table2-coco', 'table3', 'bccd')
KEYS = {'title': str, 'task': str, 'depths': list, 'datasets': list, 'cells': dict}
CELL_KEYS = {'name': str, 'model': str, 'model_kwargs': dict, 'options': dict, 'paper': dict}
OPTIONAL = {'task', 'model_kwargs', 'options', 'paper'}
LARGEST_DEPTH = 10_000
GIVEN = {  # options of a run that cannot be chosen, as --config would be by another file
    'config': 'the recipe is that of the data set; its options can be given',
    'seed': '--seeds says which seeds there are',
    'experiment': 'each run has a folder of its own name',
    **dict.fromkeys(('resume', 'no_resume_opt', 'start_epoch'), 'a run goes on by itself'),
}


def read_table(name: str) -> Dict[str, Any]:
    """Content of a table's file.

    Args:
        name: One of `TABLES`, or path of a YAML file. A file wins.

    Raises:
        UserError: Neither, or a file that does not hold a table.
    """
    path, source = Path(name), f'TABLE {name}'
    with blame(source, OSError, ValueError):  # a name that no file can have
        is_file = path.is_file()
    if not is_file:
        if name not in TABLES:
            raise UserError(f'{source}: neither a file nor a table; tables are {", ".join(TABLES)}; '
                            f'{closest(name, TABLES)}')
        path = Path(str(resources.files(f'{__package__}.tables').joinpath(f'{name}.yaml')))
    content = read_mapping(path, source)
    _check_keys(content, KEYS, source)
    content.setdefault('task', 'classification')
    _check_choice(content['task'], tuple(TASKS), f'{source}: task')
    _check_text(content['title'], f'{source}: title', 'depths')
    for depth in content['depths']:
        if not _is_depth(depth):
            raise UserError(f'{source}: depths: {depth!r} is not a number from 1 to {LARGEST_DEPTH}')
    for dataset in content['datasets']:
        _check_choice(dataset, [key for key, data in DATASETS.items() if content['task'] == data.task],
                      f'{source}: datasets')
    if 'plain' not in content['cells']:
        raise UserError(f'{source}: cells: none is named plain, the network that the others are compared with')
    for key, cell in content['cells'].items():
        _check_cell(key, cell, TASKS[content['task']], content['datasets'], f'{source}: cells: {key}')
        if '{depth}' not in cell['model'] and len({*content['depths']}) > 1:
            raise UserError(f'{source}: cells: {key}: model: {cell["model"]} is of one depth, the table of '
                            f'{", ".join(map(str, content["depths"]))}')
    return content


def _check_cell(key: Any, cell: Any, task: Task, datasets: Sequence[str], source: str) -> None:
    if not isinstance(key, str) or not re.fullmatch(r'\w+', key):  # part of a folder's name
        raise UserError(f'{source}: a name of letters, digits and _ is needed')
    if not isinstance(cell, dict):
        raise UserError(f'{source}: not a mapping of {", ".join(CELL_KEYS)}')
    _check_keys(cell, CELL_KEYS, source)
    _check_text(cell['model'], f'{source}: model', 'depth')
    _check_text(cell['name'], f'{source}: name', 'depth')
    for kind in ('model_kwargs', 'options'):
        for name in cell.get(kind, {}):
            if not isinstance(name, str):
                raise UserError(f'{source}: {kind}: {name!r} is not a name')
    if 'options' in cell:
        _check_options(cell['options'], task, f'{source}: options')
    _check_paper(cell.get('paper', {}), task, datasets, f'{source}: paper')


def _check_keys(content: Dict[Any, Any], kinds: Dict[str, type], source: str) -> None:
    for key in content:
        if key not in kinds:
            raise UserError(f'{source}: {key}: no such key; {closest(str(key), kinds)}')
    for key, kind in kinds.items():
        if key not in content and key not in OPTIONAL:
            raise UserError(f'{source}: {key}: missing')
        if key in content and (not isinstance(content[key], kind) or not content[key]):
            raise UserError(f'{source}: {key}: {content[key]!r} is not a {kind.__name__} with something in it')


def _check_choice(value: Any, known: Sequence[str], subject: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise UserError(f'{subject}: {value!r} is not one of {", ".join(known)}')


def _check_text(text: str, subject: str, *fields: str) -> None:
    """Complain of braces that hold something else than these, and of signs that break a row of a report."""
    with blame(f'{subject}: {text!r}', ValueError):
        parts = list(string.Formatter().parse(text))
    for _, field, form, conversion in parts:
        if field is not None and (field not in fields or form or conversion):
            raise UserError(f'{subject}: {text!r}: only {" and ".join(f"{{{name}}}" for name in fields)} can stand in '
                            'braces')
    if not text.isprintable() or '|' in text:
        raise UserError(f'{subject}: {text!r}: | and signs that cannot be printed, such as line breaks, cannot be '
                        'in it')


def _check_options(options: Dict[str, Any], task: Task, source: str) -> None:
    """Complain of options that a recipe could not hold either, or that are not a table's to say."""
    for name, value in options.items():
        if name in {task.network, f'{task.network}_kwargs', f'{task.unit}s', 'output', 'data', *GIVEN}:
            raise UserError(f'{source}: {name}: not for a table to say, or with a key of its own')
        if value is None or value is False:
            raise UserError(f'{source}: {name}: {value} cannot be written on a command line')
    task.parser().set_config(options, source)


def _is_depth(value: Any) -> bool:
    return is_count(value) and value <= LARGEST_DEPTH


def _check_paper(paper: Dict[Any, Any], task: Task, datasets: Sequence[str], source: str) -> None:
    """Complain of figures that have no place: they stand by depth, then by data set, then maybe by metric."""
    for depth, figures in paper.items():
        if not _is_depth(depth) or not isinstance(figures, dict):
            raise UserError(f'{source}: {depth!r}: not a depth with its figures')
        for name, figure in figures.items():
            if name != 'params':
                _check_choice(name, [*datasets, 'params'], f'{source}: {depth}')
            numbers = figure if isinstance(figure, dict) and name != 'params' else {task.metrics[0].key: figure}
            for key, number in numbers.items():
                _check_choice(key, [metric.key for metric in task.metrics], f'{source}: {depth}: {name}')
                if not is_number(number):
                    raise UserError(f'{source}: {depth}: {name}: {number!r} is not a number')
