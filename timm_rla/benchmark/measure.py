"""Speed and memory of models beside each other.

Speed on a shared machine drifts by more than the differences in question. So the models take turns: in each round each
of them runs for one slice of time, and only times of the same round are compared. The median of these ratios is the
result, their quartiles say how far to trust it.

Each model has a process to itself, as it has in use: in one that they share, the largest of them makes the C library
hold memory that the others then need not ask the system for. Where a process's memory lies, and how much of it a step
gives back to the system and takes again, makes some percent on a CPU, so that all processes are started anew now and
then.
"""
import logging
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from ..environment import describe_environment
from ..errors import blame
from ..train.progress import Progress
from .suites import Setting
from .workload import Workload, count, create

__all__ = ['measure', 'summarize', 'take_turns']

_logger = logging.getLogger(__name__)

QUARTILES = (0.25, 0.5, 0.75)
MIB = 2 ** 20

_workload: Optional[Workload] = None  # of a process that runs one model


def _start(name: str, setting: Setting, threads: int) -> None:
    global _workload
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True  # as timm's benchmark.py
        torch.backends.cudnn.benchmark = True
    _workload = Workload(create(name), setting)


def _call(method: str, *args: Any) -> Any:
    return getattr(_workload, method)(*args)


class Process:
    """A process that runs one model.

    Args:
        name: As for `create`.
        setting: What to run.
    """

    def __init__(self, name: str, setting: Setting):
        self._executor = ProcessPoolExecutor(1, get_context('spawn'))
        self._started = self._executor.submit(_start, name, setting, torch.get_num_threads())

    def call(self, method: str, *args: Any) -> Any:
        """Result of a method of the process's `Workload`; errors are raised here."""
        self._started.result()
        return self._executor.submit(_call, method, *args).result()

    def __enter__(self) -> 'Process':
        return self

    def __exit__(self, *error: Any) -> None:
        self._executor.shutdown(cancel_futures=True)


def take_turns(slices: Sequence[Callable[[], float]], rounds: int,
               report: Callable[[torch.Tensor], None] = lambda times: None) -> torch.Tensor:
    """Time each slice once in each round; every one comes first and last equally often.

    Args:
        slices: Each runs one model for a while and returns its seconds per step.
        rounds: Number of rounds.
        report: Called after each round with all times so far.

    Returns:
        Seconds per step [rounds, models], float64.
    """
    times = torch.zeros(rounds, len(slices), dtype=torch.float64)
    for index in range(rounds):
        turn = index // 2 % len(slices)
        order = [*range(turn, len(slices)), *range(turn)]
        for model in reversed(order) if index % 2 else order:
            times[index, model] = slices[model]()
        report(times[:index + 1])
    return times


def summarize(times: torch.Tensor) -> torch.Tensor:
    """Speed relative to the first model, round by round: lower quartile, median and upper quartile.

    Args:
        times: Seconds per step [rounds, models].

    Returns:
        [3, models]; above 1 is faster than the first model.
    """
    return (times[:, :1] / times).quantile(torch.tensor(QUARTILES, dtype=times.dtype), dim=0)


def measure(setting: Setting, rounds: int, seconds: float, starts: int = 1, label: str = '') -> List[Dict[str, Any]]:
    """Measure the models of a setting side by side.

    Args:
        setting: What to measure.
        rounds: Number of rounds.
        seconds: Time of one slice; at least one step is made.
        starts: How often the processes are started; the rounds are shared out among the starts, at least one each.
        label: What the progress is shown as, the setting's name if empty.

    Returns:
        A row for each model, in the columns of `results.COLUMNS`.

    Raises:
        UserError: A model cannot be created, or does not run in this setting, for lack of memory or other reasons.
    """
    label = label or setting.name
    sizes = []
    for name in setting.models:
        model = create(name)
        with blame(f'{name}, image of {setting.img_size} px', RuntimeError, ValueError):
            sizes.append(count(model, setting.img_size))

    starts = min(starts, rounds)
    times: List[torch.Tensor] = []
    with Progress(label, rounds, interval=max(1, rounds // 5)) as progress:
        def report(new: torch.Tensor, images: int) -> None:
            ratios = summarize(torch.cat([*times, new]))[1].tolist()
            named = zip(setting.models[1:], ratios[1:])
            progress.update(images, **{name: f'{ratio:.3f}' for name, ratio in named})

        for start in range(starts):
            share = rounds * (start + 1) // starts - rounds * start // starts
            with ExitStack() as stack:
                processes = [stack.enter_context(Process(name, setting)) for name in setting.models]
                steps = _each(processes, setting, f'{label}: warming up', 'warm_up', seconds)
                if not start:
                    memory = _each(processes, setting, f'{label}: memory of', 'memory')
                slices = [partial(process.call, 'time', n) for process, n in zip(processes, steps)]
                with blame(label, RuntimeError, MemoryError):
                    times.append(take_turns(slices, share, partial(report, images=setting.batch_size * sum(steps))))
    return _rows(setting, torch.cat(times), memory, sizes)


def _each(processes: Sequence[Process], setting: Setting, doing: str, method: str, *args: Any) -> List[Any]:
    """What a method returns in each process, one after the other."""
    results = []
    for name, process in zip(setting.models, processes):
        _logger.info(f'{doing} {name}')
        subject = f'{name}, {setting.mode}, batch {setting.batch_size}, {setting.img_size} px, {setting.precision}'
        with blame(subject, RuntimeError, ValueError, MemoryError):
            results.append(process.call(method, *args))
    return results


def _rows(setting: Setting, times: torch.Tensor, memory: List[float], sizes: List[Dict[str, float]]) -> List[Dict]:
    common = dict(
        setting.columns(),
        rounds=len(times),
        threads=torch.get_num_threads(),
        **describe_environment(setting.device),
    )
    step_times = times.quantile(0.5, dim=0).tolist()
    rows = []
    for name, step_time, (lower, median, upper), peak, size in zip(
            setting.models, step_times, summarize(times).T.tolist(), memory, sizes):
        row = dict(
            common,
            model=name,
            param_count=size['param_count'],
            ratio=round(median, 4),
            ratio_lower=round(lower, 4),
            ratio_upper=round(upper, 4),
            peak_memory_mib=round(peak / MIB, 2),
            memory_ratio=round(peak / memory[0], 4),
        )
        row[f'{setting.mode}_samples_per_sec'] = round(setting.batch_size / step_time, 2)
        row[f'{setting.mode}_step_time'] = round(1000 * step_time, 3)
        if setting.mode == 'infer':
            row.update(infer_gmacs=round(size['gmacs'], 4), infer_macts=round(size['macts'], 4))
        rows.append(row)
    return rows
