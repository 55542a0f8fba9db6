"""Running what a table needs: each cell and seed an ordinary training run in a folder of its own."""
import argparse
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import yaml

from ..common.errors import UserError
from ..common.files import replacing
from ..common.lock import exclusive
from ..common.options import parse
from ..common.recipes import find_recipe
from ..common.stopping import Stopped, StopRequest
from ..common.summary import read_summary
from ..common.yaml_files import read_mapping
from ..train.options import train_parser
from .plan import RECIPES, Run, Table

__all__ = ['Results', 'epochs_done', 'recipe_epochs', 'run_all', 'scaled_schedule', 'shell_commands', 'train_options']

SETTINGS = 'table.yaml'  # of a results folder: what its runs have in common
POLL = 1.  # seconds


class Results:
    """Folder with the runs of a table.

    Args:
        path: The folder.
        table: The table.
        epochs: Epochs of each run, those of the recipe if None.
        options: Further options of `timm-rla train`, the same for all runs.

    Raises:
        UserError: The folder holds runs of another table, of another length or with other options.
    """

    def __init__(self, path: Path, table: Table, epochs: Optional[int], options: Sequence[str]):
        self.path = path
        self.table = table
        self.options = list(options)
        self.epochs = epochs
        self.settings = dict(table=table.name, epochs=epochs, options=self.options)
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

    def epochs_of(self, run: Run) -> int:
        """Epochs of a run."""
        return self.epochs or recipe_epochs(run.cell.dataset)

    def missing(self, runs: Sequence[Run]) -> List[Run]:
        """Runs that are not finished."""
        return [run for run in runs if epochs_done(self.path / run.name) < self.epochs_of(run)]

    def command(self, run: Run, device: Optional[str] = None) -> List[str]:
        """Command line of a run, which goes on where it was interrupted."""
        return [sys.executable, '-m', 'timm_rla', 'train', *train_options(run, self.epochs, self.options),
                '--output', str(self.path), '--experiment', run.name, '--resume', 'auto',
                *(['--device', device] if device else [])]


def epochs_done(folder: Path) -> int:
    """Epochs that stand in the summary of a run, 0 if there is none."""
    rows = read_summary(folder)
    return int(rows[-1]['epoch']) + 1 if rows else 0


def _recipe(dataset: str) -> List[str]:
    return ['--config', str(find_recipe(RECIPES[dataset]))]


def recipe_epochs(dataset: str) -> int:
    """Length of the recipe of a data set, in epochs."""
    return parse(train_parser(), _recipe(dataset)).epochs


def scaled_schedule(args: argparse.Namespace, epochs: int) -> Dict[str, Any]:
    """Epochs of the schedule's steps, in proportion to the length of a run.

    Args:
        args: Options of the recipe.
        epochs: Length of the run.
    """
    ratio = epochs / args.epochs
    scaled: Dict[str, Any] = dict(warmup_epochs=round(ratio * args.warmup_epochs))
    if args.sched == 'multistep':  # timm counts from 1 here
        scaled['decay_milestones'] = [round(ratio * (epoch - 1)) + 1 for epoch in args.decay_milestones]
    elif args.sched == 'step':
        scaled['decay_epochs'] = ratio * args.decay_epochs
    return {name: value for name, value in scaled.items() if value != getattr(args, name)}


def train_options(run: Run, epochs: Optional[int], options: Sequence[str]) -> List[str]:
    """Options of `timm-rla train` for a run, but for its folder.

    Args:
        run: The run.
        epochs: Its length, that of the recipe if None.
        options: Further options, above those of the recipe; '{seed}' in them stands for the seed of the run.
    """
    recipe = _recipe(run.cell.dataset)
    args = parse(train_parser(), recipe)
    given = [*recipe, '--model', run.cell.model, '--seed', str(run.seed)]
    kwargs = {**args.model_kwargs, **run.cell.model_kwargs}
    if kwargs:
        given += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    if epochs is not None:
        given += ['--epochs', str(epochs)]
        for name, value in scaled_schedule(args, epochs).items():
            given += [f'--{name.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    return [*given, *(option.replace('{seed}', str(run.seed)) for option in options)]


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
    return f'{100 - read_summary(results.path / run.name)[-1]["eval_top1"]:.2f} % top-1 error'


def shell_commands(results: Results, runs: Sequence[Run]) -> List[str]:
    """A shell command for each missing run, for xargs, GNU parallel or a job array."""
    return [shlex.join(results.command(run)) for run in results.missing(runs)]
