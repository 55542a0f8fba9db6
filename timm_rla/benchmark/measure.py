"""Speed and memory of models beside each other.

Speed on a shared machine drifts by more than the differences in question. So the models take turns: in each round each
of them runs for one slice of time, and only times of the same round are compared. The median of these ratios is the
result, their quartiles say how far to trust it.

Each model has a process to itself. Where a process's memory lies makes some percent on a CPU, so that all processes are
started anew now and then.
"""
import logging
from contextlib import ExitStack
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import torch

from ..common.device import NETWORK_ERRORS
from ..common.environment import describe_environment
from ..common.errors import blame
from ..common.progress import Progress
from .processes import Process
from .suites import Setting
from .variants import create
from .workload import count

__all__ = ['measure', 'summarize', 'take_turns']

_logger = logging.getLogger(__name__)

QUARTILES = (0.25, 0.5, 0.75)
MIB = 2 ** 20
ERRORS = (TypeError, *NETWORK_ERRORS)  # of networks of any kind


class Start(NamedTuple):
    """What one start of the processes of a setting gave."""
    times: torch.Tensor  # seconds per step [rounds, models]
    allocator: str  # as `allocator.describe` says it, '' for a GPU
    memory: List[float]  # bytes for each model; empty if not asked for


def take_turns(slices: Sequence[Callable[[], float]], rounds: int,
               report: Callable[[torch.Tensor], None] = lambda times: None) -> torch.Tensor:
    """Time each slice once in each round; every one comes first and last as often, or once more.

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
        UserError: A model cannot be created, or does not run in this setting, for lack of memory or other reasons; or
            an op of layer attention deviates from its reference (`verify`).
    """
    label = label or setting.name
    sizes = [_size(name, setting) for name in setting.models]
    memory = _memory_alone(setting, label) if setting.device_type == 'cpu' else []
    starts = min(starts, rounds)
    done: List[Start] = []
    with Progress(label, rounds, interval=max(1, rounds // 5)) as progress:
        def report(images: int, times: torch.Tensor) -> None:
            ratios = summarize(torch.cat([*(start.times for start in done), times]))[1].tolist()
            named = zip(setting.models[1:], ratios[1:])
            progress.update(images, **{name: f'{ratio:.3f}' for name, ratio in named})

        for index in range(starts):
            share = rounds * (index + 1) // starts - rounds * index // starts
            start = _start(setting, share, seconds, label, report, with_memory=not memory)
            memory = memory or start.memory
            done.append(start)
    times = torch.cat([start.times for start in done])
    return _rows(setting, times, memory, sizes, done[0].allocator)


def _size(name: str, setting: Setting) -> Dict[str, float]:
    model = create(name, as_run=False)
    with blame(f'{name}, image of {setting.img_size} px', *ERRORS):
        return count(model, setting.img_size)


def _memory_alone(setting: Setting, label: str) -> List[float]:
    """Memory of each model in bytes, from a process of its own that ends at once.

    The record of all allocations is large, and on a CPU the process would keep the memory that it took.
    """
    found = []
    for name in setting.models:
        with Process(name, setting) as process:
            _ask([process], setting, f'{label}: starting', 'ready')
            _ask([process], setting, f'{label}: preparing', 'call', 'prepare')
            found += _ask([process], setting, f'{label}: memory of', 'call', 'memory')
    return found


def _start(
        setting: Setting,
        rounds: int,
        seconds: float,
        label: str,
        report: Callable[[int, torch.Tensor], None],
        with_memory: bool,
) -> Start:
    """Start a process for each model, let them take turns, end them.

    Args:
        setting: What to measure.
        rounds: Number of rounds.
        seconds: Time of one slice.
        label: What it is called in the log.
        report: Called after each round with the number of its images and all times so far.
        with_memory: Measure the memory, too.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(name, setting)) for name in setting.models]
        allocators = _ask(processes, setting, f'{label}: starting', 'ready')
        steps = _ask(processes, setting, f'{label}: warming up', 'call', 'warm_up', seconds)
        memory = _ask(processes, setting, f'{label}: memory of', 'call', 'memory') if with_memory else []
        slices = [partial(process.call, 'time', n) for process, n in zip(processes, steps)]
        with blame(label, *ERRORS):
            times = take_turns(slices, rounds, partial(report, setting.batch_size * sum(steps)))
    return Start(times, allocators[0], memory)


def _ask(processes: Sequence[Process], setting: Setting, doing: str, method: str, *args: Any) -> List[Any]:
    """What a method of each process returns, one after the other."""
    answers = []
    for process in processes:
        _logger.info(f'{doing} {process.name}')
        subject = f'{process.name}, {setting.mode}, batch {setting.batch_size}, {setting.img_size} px, ' \
                  f'{setting.precision}'
        with blame(subject, *ERRORS):
            answers.append(getattr(process, method)(*args))
    return answers


def _rows(
        setting: Setting,
        times: torch.Tensor,
        memory: List[float],
        sizes: List[Dict[str, float]],
        allocator: str,
) -> List[Dict[str, Any]]:
    common = dict(
        setting.columns(),
        rounds=len(times),
        threads=torch.get_num_threads(),
        allocator=allocator,
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
