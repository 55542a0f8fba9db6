"""`make torture`: the long forms of the tests of reliability. Prints a table and writes results/torture.csv.

With --only it writes the rows of what has been tried, the others stay. Training runs are forked from this process,
which has everything imported: a kill then costs a second.
"""
import argparse
import csv
import errno
import faulthandler
import gc
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz import READERS, try_inputs  # noqa: E402
from helpers import LAYOUTS, TINY_RUN, VARIANTS, assert_same_run, images, tiny_model  # noqa: E402

import timm_rla_cli as cli  # noqa: E402
from timm_rla.commands.quickstart import write_digits  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 3
STOPPED = 75
OPTIONS = {  # what kills are tried on
    'plain': ['--workers', '0'],
    'two workers, mixing': ['--workers', '2', '--mixup', '0.2', '--cutmix', '1.0', '--reprob', '0.3'],
    'EMA, dropout, intervals': ['--workers', '0', '--model-ema', '--drop', '0.2', '--drop-path', '0.1',
                                '--recovery-interval', '2'],
    'in memory, accumulated': ['--workers', '0', '--in-memory', '--train-crop-mode', 'pad', '--color-jitter', '0',
                               '--batch-size', '8', '--grad-accum-steps', '2', '--recovery-interval', '1'],
    'plateau, one kept': ['--workers', '0', '--sched', 'plateau', '--patience-epochs', '0', '--warmup-epochs', '0',
                          '--checkpoint-hist', '1', '--recovery-interval', '3'],
    'rare validation': ['--workers', '2', '--val-interval', '2', '--recovery-interval', '2'],
}


class Result(NamedTuple):
    """A line of the table."""
    what: str
    tries: int
    failures: List[str]


# Runs in processes of their own -------------------------------------------------------------------------------------

def forked(action: Callable[[], int], log: Path) -> int:
    """Exit code of an action in a forked process, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.setsid()
            code = action()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def command(data: Path, output: Path, options: List[str]) -> List[str]:
    return ['train', *TINY_RUN, '--data-dir', str(data), '--output', str(output), '--epochs', str(EPOCHS), '--resume',
            'auto', *options]


def run(data: Path, output: Path, options: List[str]) -> int:
    return cli.main(command(data, output, options))


def each_operation(before: Callable[[int, str], None]) -> None:
    """Call `before` with a number and a name ahead of each operation on files that changes something."""
    count = [0]

    def wrap(module: Any, name: str) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            before(count[0], name)
            return real(*args, **kwargs)

        setattr(module, name, wrapped)

    for name in ('replace', 'rename', 'fsync', 'unlink', 'mkdir', 'rmdir'):
        wrap(os, name)
    wrap(torch, 'save')
    wrap(shutil, 'copyfile')


def operations(data: Path, folder: Path, options: List[str]) -> int:
    """How many operations on files a whole run does."""
    path = folder / 'count'

    def action() -> int:
        each_operation(lambda number, name: path.write_text(str(number)))
        return cli.main(command(data, folder / 'counted', options))

    assert forked(action, folder / 'counted.log') == 0
    return int(path.read_text())


def ends_as(whole: Path, data: Path, output: Path, options: List[str], log: Path) -> str:
    """Go on with a run to its end; what is not as in an uninterrupted one, nothing if all is."""
    code = forked(partial(run, data, output, options), log)
    text = log.read_text(errors='replace')
    if code or 'Traceback' in text:
        return f'exit code {code}: {text.strip().splitlines()[-1:]}'
    try:
        assert_same_run(output / 'run', whole / 'run')
    except AssertionError as e:
        return f'differs: {str(e)[:100]}'
    left = [path.name for path in (output / 'run').iterdir() if path.name.endswith('.tmp') or 'recovery' in path.name]
    return f'left behind: {left}' if left else ''


def kills(data: Path, folder: Path, tries: int, rng: random.Random) -> List[Result]:
    """SIGKILL before operations on files, at random times, and SIGTERM: each run then ends as if nothing had been."""
    results = []
    for number, (name, options) in enumerate(OPTIONS.items()):
        whole = folder / f'whole-{number}'
        start = time.monotonic()
        assert forked(partial(run, data, whole, options), folder / 'whole.log') == 0, name
        seconds = time.monotonic() - start
        total = operations(data, folder / f'whole-{number}', options)
        failures = {'at an operation on files': [], 'at a random time': [], 'SIGTERM at a random time': []}
        each = max(1, tries // (len(OPTIONS) * len(failures)))
        for kind, failed in failures.items():
            for attempt in range(each):
                output = folder / f'{number}-{attempt}'
                shutil.rmtree(output, ignore_errors=True)
                for _ in range(rng.randint(1, 2)):  # the second one kills the run that goes on
                    _interrupt(kind, data, output, options, total, seconds, rng, folder / 'killed.log')
                problem = ends_as(whole, data, output, options, folder / 'ended.log')
                if problem:
                    failed.append(f'{name}, {attempt}: {problem}')
        results += [Result(f'killed {kind}: {name}' if 'TERM' not in kind else f'{kind}: {name}', each, failed)
                    for kind, failed in failures.items()]
        show(results[-len(failures):])
    return results


def killed_ranks(data: Path, folder: Path, tries: int, rng: random.Random) -> List[Result]:
    """SIGKILL to all of a run of two processes under torchrun, at random times."""
    options = OPTIONS['EMA, dropout, intervals'] + ['--batch-size', '8', '--no-ddp-bb']
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))

    def line(output: Path) -> List[str]:
        return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m',
                'timm_rla', *command(data, output, options)]

    start = time.monotonic()
    whole = subprocess.run(line(folder / 'whole'), env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert whole.returncode == 0, whole.stderr
    failures = []
    for attempt in range(tries):
        output = folder / str(attempt)
        process = subprocess.Popen(
            line(output), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds * rng.uniform(0.5, 1))  # the first half is the start
        for pid in [process.pid, *_children(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        again = subprocess.run(line(output), env=environment, capture_output=True, text=True)
        try:
            assert again.returncode == 0 and 'Traceback' not in again.stderr, again.stderr[-300:]
            assert_same_run(output / 'run', folder / 'whole' / 'run')
        except AssertionError as e:
            failures.append(f'{attempt}: {str(e)[:300]}')
    results = [Result('killed at a random time: two processes', tries, failures)]
    show(results)
    return results


def _children(pid: int) -> List[int]:
    """Processes below one."""
    found = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [below for child in map(int, found) for below in (child, *_children(child))]


def _interrupt(
        kind: str,
        data: Path,
        output: Path,
        options: List[str],
        total: int,
        seconds: float,
        rng: random.Random,
        log: Path,
) -> None:
    place, delay = rng.randint(1, total), rng.uniform(0, 1.1 * seconds)

    def action() -> int:
        if kind == 'at an operation on files':
            each_operation(lambda number, name: os.kill(os.getpid(), signal.SIGKILL) if number == place else None)
        else:
            number = signal.SIGTERM if 'TERM' in kind else signal.SIGKILL
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(delay)
                try:
                    os.kill(pid, number)
                finally:
                    os._exit(0)
        return cli.main(command(data, output, options))

    code = forked(action, log)
    text = log.read_text(errors='replace')
    assert code in (0, STOPPED, -signal.SIGKILL, -signal.SIGTERM), (kind, code, text)
    # After a SIGKILL the workers, whose process is gone, may still print one until they end
    assert code == -signal.SIGKILL or 'Traceback' not in text, (kind, code, text)


# Disks ---------------------------------------------------------------------------------------------------------------

def full_disks(data: Path, folder: Path, rng: random.Random) -> List[Result]:
    """No space left at each operation on files, and files that may not grow beyond many sizes."""
    options = OPTIONS['EMA, dropout, intervals']
    whole = folder / 'whole'
    assert forked(partial(run, data, whole, options), folder / 'whole.log') == 0
    total = operations(data, folder, options)
    largest = max(path.stat().st_size for path in (whole / 'run').iterdir())
    failures: Dict[str, List[str]] = {'no space left, at each operation on files': [], 'files of bounded size': []}
    tries = {}
    for kind, failed in failures.items():
        if kind.startswith('no'):
            places = range(1, total + 1)
        else:
            places = sorted(8192 + int(largest * rng.random() ** 3) for _ in range(40))  # the log takes some, too
        tries[kind] = len(places)
        for place in places:
            output = folder / 'full'
            shutil.rmtree(output, ignore_errors=True)
            limit = _no_space_from if kind.startswith('no') else _no_file_beyond
            code = forked(partial(_run_on_full_disk, limit, place, data, output, options), folder / 'full.log')
            lines = (folder / 'full.log').read_text(errors='replace').strip().splitlines()
            if code not in (0, 2) or any('Traceback' in line for line in lines):
                failed.append(f'{place}: exit code {code}, {lines[-1:]}')
            problem = ends_as(whole, data, output, options, folder / 'ended.log')
            if problem:
                failed.append(f'{place}: {problem}')
    return [Result(kind, tries[kind], failed) for kind, failed in failures.items()]


def _run_on_full_disk(
        limit: Callable[[int], None],
        place: int,
        data: Path,
        output: Path,
        options: List[str],
) -> int:
    limit(place)
    return run(data, output, options)


def _no_space_from(operation: int) -> None:
    def full(number: int, name: str) -> None:
        if number >= operation and name not in ('unlink', 'rmdir'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    each_operation(full)


def _no_file_beyond(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Readers -------------------------------------------------------------------------------------------------------------

def fuzzed(folder: Path, examples: int) -> List[Result]:
    """Damaged and hostile files for every reader of the package."""
    import logging

    logging.disable(logging.CRITICAL)
    results = []
    slow = {'checkpoint, damaged', 'folder of a run', 'checkpoint, other options', 'detector, damaged',
            'detector, other description'}
    quick = [name for name in READERS if name not in slow]
    for name, reader in READERS.items():
        count = examples // 20 if name in slow else (examples - len(slow) * (examples // 20)) // len(quick) + 1
        inside = folder / 'fuzz'
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(parents=True)

        failures = []
        try:
            try_inputs(reader, inside, count)
        except Exception as e:  # hypothesis has made it small
            failures.append(f'{type(e).__name__}: {str(e)[:200]}')
        results.append(Result(f'fuzzed: {name}', count, failures))
        show(results[-1:])
    logging.disable(logging.NOTSET)
    return results


# Leaks and numbers ---------------------------------------------------------------------------------------------------

def leaks(steps: int) -> List[Result]:
    """Memory and open files over many training steps, of each family."""
    results = []
    for variant in VARIANTS:
        model = tiny_model('cifar', variant)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = images('cifar', batch_size=4)
        marks: List[Tuple[int, int]] = []
        for step in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step in (steps // 5, steps - 1):
                gc.collect()
                pages = int(Path('/proc/self/statm').read_text().split()[1])
                marks.append((pages * resource.getpagesize() >> 10, len(os.listdir('/proc/self/fd'))))
        (before, files), (after, files_after) = marks
        failures = [f'{after - before} KiB, {files_after - files} files'] if after - before > 2048 or (
            files_after > files) else []
        results.append(Result(f'leaks: {variant}', steps, failures))
        show(results[-1:])
    return results


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def numbers() -> List[Result]:
    """Outputs and gradients in each precision against float64, relative to their largest entries."""
    results = []
    for dtype, tolerance in TOLERANCES.items():
        failures, tries = [], 0
        for layout in LAYOUTS:
            for variant in VARIANTS:
                for training in (False, True):
                    tries += 1
                    exact = tiny_model(layout, variant, torch.float64).train(training)
                    other = tiny_model(layout, variant, torch.float32).train(training)
                    other.load_state_dict(exact.state_dict())
                    x = images(layout)
                    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                        y = other(x)
                    expected = exact(x.double())
                    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
                    y.float().square().mean().backward()
                    finite = all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
                    if not (error < tolerance and finite):
                        failures.append(f'{layout} {variant} {"training" if training else "evaluation"}: {error:.2g}')
        results.append(Result(f'numbers: {str(dtype).split(".")[1]}, all families', tries, failures))
        show(results[-1:])
    return results


# The table -----------------------------------------------------------------------------------------------------------

def show(results: List[Result]) -> None:
    for result in results:
        print(f'{result.what:60} {result.tries:7,}  {"held" if not result.failures else "FAILED"}', flush=True)
        for failure in result.failures[:5]:
            print(f'    {failure}', flush=True)


def main() -> int:
    """Run everything; returns 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=216, help='kills, over all sets of options')
    parser.add_argument('--inputs', type=int, default=100_000, help='fuzzed inputs, over all readers')
    parser.add_argument('--steps', type=int, default=10_000, help='training steps that are watched for leaks')
    parser.add_argument('--only', nargs='+', choices=('kills', 'ranks', 'disks', 'readers', 'leaks', 'numbers'))
    parser.add_argument('--seed', type=int, default=0, help='of times and places')
    args = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix='torture-'))
    data = small_digits(folder)
    parts: Dict[str, Callable[[], List[Result]]] = {
        'kills': lambda: kills(data, folder / 'kills', args.kills, rng),
        'ranks': lambda: killed_ranks(data, folder / 'ranks', max(1, args.kills // 18), rng),
        'disks': lambda: full_disks(data, folder / 'disks', rng),
        'readers': lambda: fuzzed(folder, args.inputs),
        'leaks': lambda: leaks(args.steps),
        'numbers': numbers,
    }
    results: List[Result] = []
    for name, part in parts.items():
        if args.only is None or name in args.only:
            (folder / name).mkdir(exist_ok=True)
            found = part()
            if name == 'disks':
                show(found)
            results += found
            write(results, keep=args.only is not None)  # now, so that an interrupted run keeps what it has
    shutil.rmtree(folder)
    failed = sum(bool(result.failures) for result in results)
    print(f'{sum(result.tries for result in results):,} tries, {failed} of {len(results)} kinds failed')
    return 1 if failed else 0


def small_digits(folder: Path) -> Path:
    """An image folder with a few digits of each class."""
    digits = folder / 'digits'
    write_digits(digits)
    for split, count in (('train', 8), ('validation', 3)):
        for name in sorted((digits / split).iterdir()):
            for path in sorted(name.iterdir())[count:]:
                path.unlink()
    return digits


def write(results: List[Result], keep: bool) -> None:
    """Write results/torture.csv; `keep` leaves the rows of what has not been tried now."""
    path, rows = ROOT / 'results' / 'torture.csv', {}
    if keep and path.is_file():
        with open(path, newline='') as f:
            rows = {row['what']: row for row in csv.DictReader(f)}
    versions = dict(date=date.today().isoformat(), python=platform.python_version(), torch=torch.__version__,
                    timm=timm.__version__)
    for result in results:
        rows[result.what] = dict(what=result.what, tries=result.tries, failed=len(result.failures), **versions)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, ['what', 'tries', 'failed', *versions])
        writer.writeheader()
        writer.writerows(rows.values())


if __name__ == '__main__':
    sys.exit(main())
