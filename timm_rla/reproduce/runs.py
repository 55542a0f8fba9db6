"""Running what a table needs: each cell and seed an ordinary training run in a folder of its own."""
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import yaml

from ..common.errors import UserError
from ..common.files import replacing
from ..common.lock import exclusive
from ..common.options import parse
from ..common.recipes import find_recipe
from ..common.stopping import Stopped, StopRequest
from ..common.summary import SUMMARY, read_summary
from ..common.yaml_files import read_mapping
from .plan import Run, Table
from .tasks import DATASETS, Task

__all__ = ['Results', 'recipe_length', 'run_all', 'shell_commands', 'train_options']

SETTINGS = 'table.yaml'  # of a results folder: what its runs have in common
POLL = 1.  # seconds


class Results:
    """Folder with the runs of a table.

    Args:
        path: The folder.
        table: The table.
        length: Epochs or iterations of each run, those of the recipe if None.
        options: Further options of the runs' command, the same for all runs.

    Raises:
        UserError: The folder holds runs of another table, of another length or with other options.
    """

    def __init__(self, path: Path, table: Table, length: Optional[int], options: Sequence[str]):
        self.path = path
        self.table = table
        self.options = list(options)
        self.length = length
        self.settings = {'table': table.name, f'{table.task.unit}s': length, 'options': self.options}
        file = path / SETTINGS
        if file.is_file():
            found = read_mapping(file, f'--output {path}')
            differ = [f'{key} {found.get(key)}, not {value}' for key, value in self.settings.items()
                      if found.get(key) != value]
            if differ:
                raise UserError(f'--output {path}: holds runs of {"; ".join(differ)}; choose another folder')
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f'--output {path}: neither empty nor the results of a table')

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other harnesses out of the folder.

        Raises:
            UserError: Another one is at work there.
        """
        with exclusive(self.path, lambda holder: f'--output {self.path}: another process runs this table'):
            with replacing(self.path / SETTINGS) as temporary:
                temporary.write_text(yaml.safe_dump(self.settings, sort_keys=False))
            yield

    @cached_property
    def ends(self) -> Dict[str, int]:
        """Epochs or iterations of the runs on each data set, as their options come to."""
        task = self.table.task
        first = {cell.dataset: Run(cell, 0) for cell in self.table.cells}
        return {dataset: task.length(parse(task.parser(), train_options(task, run, self.length, self.options)))
                for dataset, run in first.items()}

    def is_finished(self, run: Run) -> bool:
        """True if the summary of a run goes to its end."""
        rows = read_summary(self.path / run.name)
        return bool(rows) and self.table.task.done(rows[-1]) >= self.ends[run.cell.dataset]

    def missing(self, runs: Sequence[Run]) -> List[Run]:
        """Runs that are not finished."""
        return [run for run in runs if not self.is_finished(run)]

    def command(self, run: Run, device: Optional[str] = None) -> List[str]:
        """Command line of a run, which goes on where it was interrupted."""
        task = self.table.task
        return [sys.executable, '-m', 'timm_rla', *task.command, *train_options(task, run, self.length, self.options),
                '--output', str(self.path), '--experiment', run.name, '--resume', 'auto',
                *(['--device', device] if device else [])]


def _recipe(dataset: str) -> List[str]:
    return ['--config', str(find_recipe(DATASETS[dataset].recipe))]


def recipe_length(task: Task, dataset: str) -> int:
    """Length of the recipe of a data set, in epochs or iterations."""
    return getattr(parse(task.parser(), _recipe(dataset)), f'{task.unit}s')


def train_options(task: Task, run: Run, length: Optional[int], options: Sequence[str]) -> List[str]:
    """Options of a run's command, but for its folder.

    Args:
        task: What the table's runs are.
        run: The run.
        length: Its epochs or iterations, those of the recipe if None.
        options: Further options, above those of the recipe; '{seed}' and '{cell}' in them stand for the
            run's seed and the key of its network, such as 'plain'.
    """
    recipe = _recipe(run.cell.dataset)
    args = parse(task.parser(), recipe)
    given = [*recipe, f'--{task.network}', run.cell.model, '--seed', str(run.seed)]
    kwargs = {**getattr(args, f'{task.network}_kwargs'), **run.cell.model_kwargs}
    if kwargs:
        given += [f'--{task.network}-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    if length is not None:
        given += [f'--{task.unit}s', str(length)]
        for name, value in task.scaled_schedule(args, length).items():
            given += [f'--{name.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    return [*given, *(o.replace('{seed}', str(run.seed)).replace('{cell}', run.cell.key) for o in options)]


def run_all(results: Results, runs: Sequence[Run], jobs: int = 1, devices: Sequence[str] = ()) -> List[Run]:
    """Run what is missing, some at a time; each writes a log beside its folder.

    Args:
        results: Where.
        runs: All runs of the table.
        jobs: How many at a time.
        devices: Devices that they are spread over, that of the options if empty.

    Returns:
        Runs that failed.

    Raises:
        Stopped: This process was asked to stop, and has stopped the runs, which go on from there next time.
    """
    with StopRequest() as stop:
        return _run_all(results, runs, jobs, devices, stop)


def _run_all(
        results: Results,
        runs: Sequence[Run],
        jobs: int,
        devices: Sequence[str],
        stop: StopRequest,
) -> List[Run]:
    waiting, active, failed = results.missing(runs), {}, []
    total = len(waiting)
    print(f'{len(runs) - total} of {len(runs)} runs are finished, {total} to go', flush=True)
    slots = list(range(jobs))
    try:
        while waiting or active:
            if stop.received:
                raise Stopped('asked to stop by a signal; the same command goes on')
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                device = devices[slot % len(devices)] if devices else None
                log = open(results.path / f'{run.name}.log', 'ab')
                process = subprocess.Popen(
                    results.command(run, device), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                active[run] = process, slot, log, time.monotonic()
            time.sleep(POLL)
            for run, (process, slot, log, start) in list(active.items()):
                if process.poll() is None:
                    continue
                log.close()
                del active[run]
                slots.append(slot)
                if process.returncode:
                    failed.append(run)
                done = total - len(waiting) - len(active)
                print(f'[{done}/{total}] {run.name}  {_outcome(results, run, process.returncode)}  '
                      f'{(time.monotonic() - start) / 60:.1f} min', flush=True)
    finally:
        for process, _, _, _ in active.values():  # interrupted: the runs keep where they are
            process.terminate()
        for process, _, log, _ in active.values():
            process.wait()
            log.close()
    return failed


def _outcome(results: Results, run: Run, returncode: int) -> str:
    if returncode:
        lines = (results.path / f'{run.name}.log').read_text(errors='replace').strip().splitlines()
        return f'failed: {lines[-1] if lines else f"exit code {returncode}"}'
    rows = read_summary(results.path / run.name)
    if not rows:
        return f'ended, but its {SUMMARY} has no row'
    return ', '.join(f'{metric.name} {metric.value(rows[-1]):.2f} %' for metric in results.table.task.metrics)


def shell_commands(results: Results, runs: Sequence[Run]) -> List[str]:
    """A shell command for each missing run, for xargs, GNU parallel or a job array."""
    return [shlex.join(results.command(run)) for run in results.missing(runs)]
