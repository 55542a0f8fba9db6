"""Running what a table needs: each cell and seed an ordinary training run in a folder of its own."""
import re
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import yaml

from ..common.errors import UserError, blame
from ..common.files import TEMPORARY, replacing
from ..common.lock import exclusive, held_by
from ..common.options import parse
from ..common.recipes import recipes
from ..common.stopping import Stopped, StopRequest
from ..common.summary import SUMMARY, read_summary
from ..common.yaml_files import read_mapping
from .content import GIVEN
from .plan import Run, Table, runs_there
from .tasks import DATASETS, Task

__all__ = ['Results', 'recipe_length', 'run_all', 'shell_commands', 'train_options']

SETTINGS = 'table.yaml'  # of a results folder: what its runs have in common
POLL = 1.  # seconds
PATIENCE = 2  # runs that may fail in a row, before no more are started in their place
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
        self.settings = {'table': table.name, f'{table.task.unit}s': length, 'options': self.options}
        task = table.task
        args = {cell: parse(task.parser(), train_options(task, Run(cell, 0), length, options)) for cell in table.cells}
        for cell, parsed in args.items():
            if getattr(parsed, 'val_split', None) == '':
                raise UserError(f"--val-split '': {cell.name} would have no {task.measure} to report")
        self.ends = {cell: task.length(args[cell]) for cell in table.cells}  # epochs or iterations of the runs
        self.parameters = {  # complains of a network that cannot be built now, not after the runs
            cell: task.parameters(args[cell], DATASETS[cell.dataset].num_classes) for cell in table.cells
        }
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
        found = read_mapping(self.path / SETTINGS, f'--output {self.path}')
        noted = found.get('data_note', '')
        self.note = self.note or (noted if isinstance(noted, str) and noted.isprintable() else '')
        differ = [f'{key} {found.get(key)}, not {value}' for key, value in self.settings.items()
                  if found.get(key) != value and not (key == 'options' and self._means_the_same(found.get(key)))]
        if differ and any(entry.is_dir() for entry in held):
            raise UserError(f'--output {self.path}: holds runs of {"; ".join(differ)}; choose another folder')
        return not differ

    def _means_the_same(self, options: Any) -> bool:
        """True for options of the table that are these, otherwise written, but for where and how runs go."""
        if not isinstance(options, list):
            return False
        task = self.table.task
        for run in (Run(cell, seed) for cell in self.table.cells for seed in (0, 1)):  # {cell} and {seed} differ
            try:
                first, second = (vars(parse(task.parser(), train_options(task, run, self.length, given)))
                                 for given in (list(map(str, options)), self.options))
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
            args = vars(parse(task.parser(), train_options(task, run, self.length, self.options)))
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
        return [sys.executable, '-m', 'timm_rla', *task.command, *train_options(task, run, self.length, self.options),
                f'--output={self.path}', '--experiment', run.name, '--resume', 'auto',
                *(['--device', device] if device else [])]


def _recipe(dataset: str) -> List[str]:
    return ['--config', str(recipes()[DATASETS[dataset].recipe])]


def recipe_length(task: Task, dataset: str) -> int:
    """Length of the recipe of a data set, in epochs or iterations."""
    return getattr(parse(task.parser(), _recipe(dataset)), f'{task.unit}s')


def train_options(task: Task, run: Run, length: Optional[int], options: Sequence[str]) -> List[str]:
    """Options of a run's command, but for its folder.

    Args:
        task: What the table's runs are.
        run: The run.
        length: Its epochs or iterations, those of the recipe if None.
        options: Further options, above those of the recipe; '{seed}', '{cell}' and '{depth}' in them stand for the
            run's seed, the key of its network, such as 'plain', and its depth.

    Raises:
        UserError: Options that the command does not have, or that say otherwise than the table.
    """
    recipe = _recipe(run.cell.dataset)
    args = parse(task.parser(), recipe)
    options = [_filled(option, run) for option in options]
    given = [*recipe]
    kwargs = {**getattr(args, f'{task.network}_kwargs'), **_further_kwargs(task, run, options),
              **run.cell.model_kwargs}
    if length is not None:
        given += [f'--{task.unit}s', str(length)]
        for name, value in task.scaled_schedule(args, length).items():
            given += [f'--{name.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    # An option with one value ends those of the schedule: the user's options may begin with a folder
    given += [f'--{task.network}', run.cell.model, '--seed', str(run.seed), *options, *_words(task, run)]
    if kwargs:  # behind the options, whose own would take the place of the others
        given += [f'--{task.network}-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    return given


def _filled(text: str, run: Run) -> str:
    for field, value in (('{seed}', run.seed), ('{cell}', run.cell.key), ('{depth}', run.cell.depth)):
        text = text.replace(field, str(value))
    return text


def _words(task: Task, run: Run) -> List[str]:
    """Options of a cell, by names as in recipes, as they are written on a command line."""
    words: List[str] = []
    for name, value in run.cell.options.items():
        option = f'--{name.replace("_", "-")}'
        if value is True:
            words += [option]
        elif isinstance(value, (dict, list)):
            entries = [f'{key}={entry}' for key, entry in value.items()] if isinstance(value, dict) else value
            words += [option, *(_filled(str(entry), run) for entry in entries)]
        else:  # which may begin with a minus
            words += [f'{option}={_filled(str(value), run)}']
    return words


def _further_kwargs(task: Task, run: Run, options: Sequence[str]) -> Dict[str, Any]:
    """Arguments of the network among further options, none of which may say otherwise than the table."""
    parser = task.parser()
    reasons = {task.network: 'the table says which networks there are; --only and --depth choose among them', **GIVEN,
               **{name: f'the table says what it is for {run.cell.name}' for name in run.cell.options}}
    parser.set_defaults(**dict.fromkeys(reasons))
    found = parser.parse_args(options)
    for name, reason in reasons.items():
        value = getattr(found, name)
        if value is not None:
            raise UserError(f'--{name.replace("_", "-")} {value}: cannot be given: {reason}')
    kwargs = getattr(found, f'{task.network}_kwargs')
    for key in kwargs.keys() & run.cell.model_kwargs.keys():
        if kwargs[key] != run.cell.model_kwargs[key]:
            raise UserError(f'--{task.network}-kwargs {key}={kwargs[key]}: {run.cell.name} of this table has '
                            f'{key}={run.cell.model_kwargs[key]}')
    return kwargs


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
    slots = list(range(min(jobs, max(1, total))))
    failures = dict.fromkeys(slots, 0)  # in a row

    def check_stop() -> None:
        if stop.received:
            raise Stopped('asked to stop by a signal; the same command goes on')

    try:
        while active or waiting and slots:
            while waiting and slots:
                check_stop()
                run = waiting.pop(0)
                holder = held_by(results.path / run.name)
                if holder:
                    print(f'{run.name}  is under way: {holder} writes there; it is left alone', flush=True)
                    total -= 1
                    continue
                slot = slots.pop(0)
                device = devices[slot % len(devices)] if devices else None
                with blame(f'--output {results.path}', OSError):
                    log = open(results.path / f'{run.name}.log', 'ab')
                begin = log.tell()
                process = subprocess.Popen(
                    results.command(run, device), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                active[run] = process, slot, log, begin, time.monotonic()
            time.sleep(POLL)
            check_stop()
            for run, (process, slot, log, begin, start) in list(active.items()):
                if process.poll() is None:
                    continue
                log.close()
                del active[run]
                failures[slot] = failures[slot] + 1 if process.returncode else 0
                if process.returncode:
                    check_stop()  # it may have been asked, too, and sooner
                    failed.append(run)
                if failures[slot] < PATIENCE:
                    slots.append(slot)
                done = total - len(waiting) - len(active)
                print(f'[{done}/{total}] {run.name}  {_outcome(results, run, process.returncode, begin)}  '
                      f'{(time.monotonic() - start) / 60:.1f} min', flush=True)
                if failures[slot] == PATIENCE and waiting:
                    device = f' on {devices[slot % len(devices)]}' if devices else ''
                    print(f'{PATIENCE} runs have failed in a row{device}: no more are started there', flush=True)
        if waiting:
            print(f'{len(waiting)} runs were not started', flush=True)
    finally:
        for process, *_ in active.values():  # interrupted: the runs keep where they are
            process.terminate()
        for process, _, log, *_ in active.values():
            process.wait()
            log.close()
    return failed


def _outcome(results: Results, run: Run, returncode: int, begin: int) -> str:
    """How a run has ended, in words; `begin` is where its part of the log begins."""
    if returncode:
        text = (results.path / f'{run.name}.log').read_bytes()[begin:].decode(errors='replace')
        lines = re.findall(r'^timm-rla .*: error: .*', text, re.MULTILINE) or text.strip().splitlines()
        return f'failed: {lines[-1] if lines else f"exit code {returncode}"}'
    rows = results.rows(run)
    if not rows:
        return f'ended, but its {SUMMARY} has no row with {results.table.task.measure}'
    return ', '.join(f'{metric.name} {metric.value(rows[-1]):.2f} %' for metric in results.table.task.metrics)


def shell_commands(results: Results, runs: Sequence[Run]) -> List[str]:
    """A shell command for each missing run, for xargs, GNU parallel or a job array.

    Raises:
        UserError: One would not be a line.
    """
    for option in [*results.options, str(results.path)]:
        if not option.isprintable():
            raise UserError(f'--print: {option!r} has signs that cannot be printed, such as line breaks; a command is '
                            'one line')
    return [shlex.join(results.command(run)) for run in results.missing(runs)]
