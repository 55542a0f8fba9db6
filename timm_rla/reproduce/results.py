"""A results folder: the runs of a table, and what they have in common."""
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import yaml

from ..common.errors import UserError, blame
from ..common.files import TEMPORARY, replacing
from ..common.lock import exclusive
from ..common.options import parse
from ..common.summary import read_summary
from ..common.yaml_files import read_mapping
from .arguments import run_options
from .plan import Cell, Run, Table, runs_there
from .tasks import DATASETS

__all__ = ['Results']

SETTINGS = 'table.yaml'  # of the folder: what its runs have in common
ARGS = 'args.yaml'  # of a run: its options
ELSEWHERE = {'output', 'experiment', 'resume', 'device', 'workers'}  # options that may be others on another machine


class Results:
    """Folder with the runs of a table.

    Args:
        path: The folder.
        table: The table.
        length: Epochs or iterations of each run, those of the recipe if None.
        options: Further options of the runs' command, the same for all runs.
        note: What the titles of reports say of the data; what was said before if empty.

    Raises:
        UserError: The folder holds runs of another table, of another length or with other options, or something else;
            or the options are none of the runs' command, or take from the table what it is.
    """

    def __init__(self, path: Path, table: Table, length: Optional[int], options: Sequence[str], note: str = ''):
        self.path = path
        self.table = table
        self.options = list(options)
        self.length = length
        self.note = note
        name = f'{table.name}.yaml' if table.is_own else table.name  # one of the package may have the same
        self.settings = {'table': name, f'{table.task.unit}s': length, 'options': self.options}
        task = table.task
        args = {cell: parse(task.parser(), run_options(task, Run(cell, 0), length, options)) for cell in table.cells}
        for cell, parsed in args.items():
            if getattr(parsed, 'val_split', None) == '':
                raise UserError(f"--val-split '': {cell.name} would have no {task.measure} to report")
        self.ends = {cell: task.length(args[cell]) for cell in table.cells}  # epochs or iterations of the runs
        self.parameters: Dict[Cell, int] = {}
        for cell in table.cells:  # complains of a network that cannot be built now, not after the runs
            try:
                self.parameters[cell] = task.parameters(args[cell], DATASETS[cell.dataset].num_classes)
            except UserError as e:
                raise UserError(f'{cell.name}: {e}') from e
        self.recorded = self._check_folder()

    def _check_folder(self) -> bool:
        """Complain of a folder with something else in it; True if it says that it is for these runs.

        One without any run is free for others: nothing has come yet of what was planned there.
        """
        with blame(f'--output {self.path}', OSError):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f'--output {self.path}: is a file, not a folder')
            entries = sorted(self.path.iterdir()) if self.path.is_dir() else []
        held = [entry for entry in entries if not entry.name.startswith('.') and not entry.name.endswith(TEMPORARY)]
        if self.path / SETTINGS not in held:
            if held:
                raise UserError(f'--output {self.path}: neither empty nor the results of a table')
            return False
        found = read_mapping(self.path / SETTINGS, f'--output {self.path}: {SETTINGS}')
        if not {'table', 'options'} <= found.keys():  # a file of the user's, which may be this very table
            raise UserError(f'--output {self.path}: its {SETTINGS} is none of results; choose another folder')
        noted = found.get('data_note', '')
        self.note = self.note or (noted if isinstance(noted, str) and noted.isprintable() else '')
        differ = [f'{key} {found.get(key)}, not {value}' for key, value in self.settings.items()
                  if found.get(key) != value and not (key != 'table' and self._means_the_same({key: found.get(key)}))]
        if differ and any(entry.is_dir() for entry in held):
            raise UserError(f'--output {self.path}: holds runs of {"; ".join(differ)}; choose another folder')
        return not differ

    def _means_the_same(self, found: Dict[str, Any]) -> bool:
        """True for settings of which runs come that are these, otherwise written, but for where and how they go."""
        task = self.table.task
        unit = f'{task.unit}s'
        length, options = (dict(self.settings, **found)[name] for name in (unit, 'options'))
        if not isinstance(options, list) or not (length is None or type(length) is int):
            return False
        for run in (Run(cell, seed) for cell in self.table.cells for seed in (0, 1)):  # {cell} and {seed} differ
            try:
                first, second = (
                    vars(parse(task.parser(), run_options(task, run, *given)))
                    for given in ((length, list(map(str, options))), (self.length, self.options)))
            except UserError:  # options of another version
                return False
            if any(first[name] != second[name] for name in first if name not in ELSEWHERE):
                return False
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other harnesses out of the folder.

        Raises:
            UserError: Another one is at work there.
        """
        with exclusive(self.path, lambda holder: f'--output {self.path}: another process runs this table'):
            self.write_settings()
            yield

    def write_settings(self) -> None:
        """Write down what the runs have in common, and the note."""
        settings = dict(self.settings, **({'data_note': self.note} if self.note else {}))
        with blame(f'--output {self.path}', OSError), replacing(self.path / SETTINGS) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding='utf-8')
        self.recorded = True

    def record(self) -> None:
        """Make the folder one of these runs, which others may start there."""
        if not self.recorded:
            with self.locked():
                pass

    def seeds(self, asked: Sequence[int]) -> List[int]:
        """These seeds, and all others that cells of the table have runs of: none is left out of a report."""
        cells = {cell.folder for cell in self.table.cells}
        found = {int(run['seed']) for run in runs_there(self.path) if run['folder'] in cells}
        return sorted(found.union(asked))

    def others(self, seeds: Sequence[int]) -> List[str]:
        """Names of runs in the folder that are of no cell of the table with one of these seeds."""
        own = {Run(cell, seed).name for cell in self.table.cells for seed in seeds}
        return [run['name'] for run in runs_there(self.path) if run['name'] not in own]

    def rows(self, run: Run) -> List[Dict[str, float]]:
        """Rows of a run's summary that a report can use; those without validation, or damaged, are not among them."""
        return [row for row in read_summary(self.path / run.name) if self.table.task.is_whole(row)]

    def _check_run(self, run: Run) -> None:
        """Complain of a run with other options: its command may have been printed before the folder became of these."""
        file = self.path / run.name / ARGS
        if file.is_file():
            task, found = self.table.task, read_mapping(file, str(file))
            args = vars(parse(task.parser(), run_options(task, run, self.length, self.options)))
            options = yaml.safe_load(yaml.safe_dump(args))  # as they are in the file, where a tuple is a list
            differ = [f'{name} {found[name]}, not {options[name]}' for name in sorted(found.keys() & options.keys())
                      if name not in ELSEWHERE and found[name] != options[name]]
            if differ:
                raise UserError(f'--output {self.path}: {run.name} is a run with {"; ".join(differ)}; choose another '
                                'folder')

    def is_finished(self, run: Run) -> bool:
        """True if the summary of a run goes to its end.

        Raises:
            UserError: It is a run with other options.
        """
        self._check_run(run)
        rows = read_summary(self.path / run.name)
        return bool(rows) and self.table.task.done(rows[-1]) >= self.ends[run.cell]

    def missing(self, runs: Sequence[Run]) -> List[Run]:
        """Runs that are not finished."""
        return [run for run in runs if not self.is_finished(run)]

    def command(self, run: Run, device: Optional[str] = None) -> List[str]:
        """Command line of a run, which goes on where it was interrupted."""
        task = self.table.task
        return [sys.executable, '-m', 'timm_rla', *task.command, *run_options(task, run, self.length, self.options),
                f'--output={self.path}', '--experiment', run.name, '--resume', 'auto',
                *(['--device', device] if device else [])]
