"""Running what a table needs: each cell and seed an ordinary training run in a folder of its own."""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import BinaryIO, Dict, List, Optional, Sequence

from ..common.errors import UserError, blame
from ..common.lock import held_by
from ..common.stopping import Stopped, StopRequest
from ..common.summary import SUMMARY
from .plan import Run
from .results import Results

__all__ = ['run_all', 'shell_commands']

POLL = 1.  # seconds
PATIENCE = 2  # runs that may fail in a row, before no more are started in their place


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


@dataclass
class _Active:
    """A run under way: its process, the slot that it takes, its log and where its own part of that begins."""
    process: subprocess.Popen
    slot: int
    log: BinaryIO
    begin: int
    start: float = field(default_factory=time.monotonic)


def _say(text: str) -> None:
    """Print a line. If nobody reads it any more, as where `tee` has died, the runs go on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(results: Results, run: Run, slot: int, device: Optional[str]) -> _Active:
    with blame(f'--output {results.path}', OSError):
        log = open(results.path / f'{run.name}.log', 'ab')
    begin = log.tell()  # now: the process moves on what it shares
    process = subprocess.Popen(results.command(run, device), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    return _Active(process, slot, log, begin)


def _run_all(
        results: Results,
        runs: Sequence[Run],
        jobs: int,
        devices: Sequence[str],
        stop: StopRequest,
) -> List[Run]:
    waiting, failed = results.missing(runs), []
    total = len(waiting)
    _say(f'{len(runs) - total} of {len(runs)} runs are finished, {total} to go')
    active: Dict[Run, _Active] = {}
    slots = list(range(min(jobs, max(1, total))))  # free ones
    device = {slot: devices[slot % len(devices)] if devices else None for slot in slots}
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
                    _say(f'{run.name}  is under way: {holder} writes there; it is left alone')
                    total -= 1
                    continue
                slot = slots.pop(0)
                active[run] = _start(results, run, slot, device[slot])
            time.sleep(POLL)
            check_stop()
            for run, at_work in list(active.items()):
                returncode, slot = at_work.process.poll(), at_work.slot
                if returncode is None:
                    continue
                at_work.log.close()
                del active[run]
                failures[slot] = failures[slot] + 1 if returncode else 0
                if returncode:
                    check_stop()  # it may have been asked, too, and sooner
                    failed.append(run)
                if failures[slot] < PATIENCE:
                    slots.append(slot)
                done = total - len(waiting) - len(active)
                _say(f'[{done}/{total}] {run.name}  {_outcome(results, run, returncode, at_work.begin)}  '
                     f'{(time.monotonic() - at_work.start) / 60:.1f} min')
                if failures[slot] == PATIENCE and waiting:
                    place = f' on {device[slot]}' if device[slot] else ''
                    _say(f'{PATIENCE} runs have failed in a row{place}: no more are started there')
        if waiting:
            _say(f'{len(waiting)} runs were not started')
    finally:
        for at_work in active.values():  # interrupted: the runs keep where they are
            at_work.process.terminate()
        for at_work in active.values():
            at_work.process.wait()
            at_work.log.close()
    return failed


def _outcome(results: Results, run: Run, returncode: int, begin: int) -> str:
    """How a run has ended, in words; `begin` is where its part of the log begins."""
    if returncode < 0:
        return f'failed: killed by signal {-returncode} ({signal.strsignal(-returncode)})'
    if returncode:
        text = (results.path / f'{run.name}.log').read_bytes()[begin:].decode(errors='replace')
        lines = re.findall(r'^timm-rla .*: error: .*', text, re.MULTILINE) or text.strip().splitlines()
        return f'failed: {lines[-1] if lines else f"exit code {returncode}"}'
    rows = results.rows(run)
    if not rows:
        return f'ended, but its {SUMMARY} has no row with {results.table.task.measure}'
    return ', '.join(f'{metric.name} {metric.value(rows[-1]):.2f} %' for metric in results.table.task.metrics)


def shell_commands(results: Results, runs: Sequence[Run]) -> List[str]:
    """A shell command for each missing run, for GNU parallel, `xargs -d '\\n' -n 1 sh -c` or a job array.

    Raises:
        UserError: One would not be a line.
    """
    for option in [*results.options, str(results.path)]:
        if not option.isprintable():
            raise UserError(f'--print: {option!r} has signs that cannot be printed, such as line breaks; a command is '
                            'one line')
    return [shlex.join(results.command(run)) for run in results.missing(runs)]
