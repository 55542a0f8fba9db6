"""What a table consists of: its cells, and the training runs that they need."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence, Set

import timm

from ..common.errors import UserError, blame, closest
from ..common.extras import import_modules
from .content import read_table
from .tasks import TASKS, Task

__all__ = ['Cell', 'Run', 'Table', 'load_table', 'plan_runs', 'runs_there']


@dataclass(frozen=True)
class Cell:
    """A network of a table on a data set."""
    key: str  # such as 'rla'
    name: str  # such as 'RLA-56'
    model: str
    depth: int
    dataset: str
    model_kwargs: Dict[str, Any] = field(default_factory=dict, hash=False)
    options: Dict[str, Any] = field(default_factory=dict, hash=False)  # of its runs, by names as in recipes
    paper: Dict[str, float] = field(default_factory=dict, hash=False)  # its figures in percent, by keys of metrics
    paper_params: Optional[float] = None  # in millions

    @property
    def folder(self) -> str:
        """Name of its runs' folders, less the seed."""
        return f'{self.dataset}-{self.depth}-{self.key}'


@dataclass(frozen=True)
class Table:
    """A table: cells in the order of its rows, the plain network of each depth and data set first."""
    name: str
    title: str
    task: Task
    cells: List[Cell]
    is_own: bool  # a user's file

    def plain(self, cell: Cell) -> Cell:
        """The plain network that a cell is compared with."""
        return next(c for c in self.cells if c.key == 'plain' and (c.depth, c.dataset) == (cell.depth, cell.dataset))


@dataclass(frozen=True)
class Run:
    """A training run: a cell and a seed."""
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f'{self.cell.folder}-seed{self.seed}'


def load_table(
        name: str,
        depths: Optional[Sequence[int]] = None,
        datasets: Optional[Sequence[str]] = None,
        only: Optional[Sequence[str]] = None,
        found: Collection[str] = (),
) -> Table:
    """A table, or a part of it.

    Args:
        name: One of `TABLES`, or path of a YAML file.
        depths: Depths, those of the paper if None.
        datasets: Data sets, all of the table if None.
        only: Keys of cells, all if None; the plain network is always there.
        found: Keys of cells that have runs already: they are there, too, so that a report leaves no run out. Those of
            no cell of the table are passed over.

    Raises:
        UserError: No such table, a data set or a cell that it does not have, or a network or depth that there is not.
    """
    content = read_table(name)
    _check('--datasets', datasets, content['datasets'])
    _check('--only', only, content['cells'])
    entries = {key: entry for key, entry in content['cells'].items()
               if only is None or key in {'plain', *only, *found}}
    for key, entry in entries.items():
        modules = entry.get('options', {}).get('device_modules', [])  # they may register networks
        import_modules(modules, f'TABLE {name}: cells: {key}: options: device_modules')
    depths = list(dict.fromkeys(depths or content['depths']))
    if {*depths} != {*content['depths']}:
        _check_depths(depths, {entry['model'] for entry in entries.values()})
    task = TASKS[content['task']]
    cells = [
        _cell(key, entry, depth, dataset, task, f'TABLE {name}')
        for dataset in dict.fromkeys(datasets or content['datasets']) for depth in depths
        for key, entry in entries.items()
    ]
    title = content['title'].format(depths=', '.join(map(str, depths)))
    return Table(Path(name).stem, title, task, cells, is_own=Path(name).is_file())


def _check(option: str, given: Optional[Sequence[str]], known: Sequence[str]) -> None:
    for value in given or []:
        if value not in known:
            raise UserError(f'{option} {value}: not in this table, which has {", ".join(known)}')


def _check_depths(depths: Sequence[int], models: Set[str]) -> None:
    """Complain of a depth that one of the networks does not have; '{depth}' stands for it in their names."""
    for model in models:
        if '{depth}' not in model:
            raise UserError(f'--depth {" ".join(map(str, depths))}: {model} of this table is of one depth')
    names = timm.list_models()
    patterns = [re.compile(re.escape(model).replace(re.escape('{depth}'), r'(\d+)')) for model in models]
    known = set.intersection(
        *({int(found[1]) for found in map(pattern.fullmatch, names) if found} for pattern in patterns))
    for depth in depths:
        if depth not in known:
            raise UserError(f'--depth {depth}: there are no such networks; these are of depth '
                            f'{", ".join(map(str, sorted(known))) or "none in common"}')


def _cell(key: str, entry: Dict[str, Any], depth: int, dataset: str, task: Task, source: str) -> Cell:
    model = entry['model'].format(depth=depth)
    if not timm.is_model(model):
        raise UserError(f'{source}: cells: {key}: model: {model}: no such model; {closest(model, timm.list_models())}')
    paper = entry.get('paper', {}).get(depth, {})
    figures = paper.get(dataset, {})  # one number, or several by metric
    return Cell(
        key,
        entry['name'].format(depth=depth),
        model,
        depth,
        dataset,
        entry.get('model_kwargs', {}),
        entry.get('options', {}),
        figures if isinstance(figures, dict) else {task.metrics[0].key: figures},
        paper.get('params'),
    )


def plan_runs(table: Table, seeds: Sequence[int], only: Optional[Sequence[str]] = None) -> List[Run]:
    """The runs of a table, seed by seed: the first seeds of all cells come before the second ones.

    Args:
        table: The table.
        seeds: Seeds of each cell.
        only: Keys of cells, all if None; the plain network is always there.
    """
    return [Run(cell, seed) for seed in seeds for cell in table.cells
            if only is None or cell.key in {'plain', *only}]


def runs_there(folder: Path) -> List[Dict[str, str]]:
    """What the names of the runs in a folder say: `name`, the cell's `folder` and `key`, and `seed`.

    Raises:
        UserError: It cannot be read.
    """
    with blame(f'--output {folder}', OSError):
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [re.fullmatch(r'(?P<name>(?P<folder>\w+-\d+-(?P<key>\w+))-seed(?P<seed>\d+))', name) for name in names]
    return [match.groupdict() for match in found if match]
