"""The epochs of a training run, and the state that makes one that was interrupted go on as if it had not been."""
import logging
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from timm import utils

from ..common.device import Placement
from ..common.errors import blame
from ..common.evaluation import evaluate
from ..common.stopping import StopRequest
from .data import TrainData
from .epoch import Trainer
from .folder import RunFolder
from .recovery import Position, Watch
from .rng import get_rng_state, set_rng_state
from .scalars import ScalarLog

__all__ = ['STATE_ERRORS', 'Intervals', 'Run', 'restore', 'run_epochs']

_logger = logging.getLogger(__name__)

STATE_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # that damaged states lead to


class Intervals(NamedTuple):
    """How often things happen."""
    log: int  # batches
    recovery: int  # batches; 0 for never
    validation: int  # epochs
    mixing: int  # first epochs, in which images are mixed; 0 for all


@dataclass
class Run:
    """What the epochs of a run are made with."""
    trainer: Trainer
    eval_models: Dict[str, nn.Module]  # by what is added to the label of their progress
    metric: str  # of the best checkpoint
    start_epoch: int
    num_epochs: int
    updates_per_epoch: int
    intervals: Intervals
    dist_bn: str  # how processes share running statistics, as for `_share_statistics`
    origin: Dict[str, Any]  # what checkpoints say of model and options, as timm's scripts read it
    state: Dict[str, Any]  # what this process left beside the checkpoint that the run goes on from

    @property
    def position(self) -> Position:
        """Where in its first epoch the run begins."""
        return Position(**self.state.get('position', {}))


def run_epochs(
        run: Run,
        data: TrainData,
        folder: RunFolder,
        stop: StopRequest,
        scalar_logs: Sequence[ScalarLog] = (),
) -> None:
    """Train and evaluate epoch by epoch; checkpoints and the rows of summary.csv go into the folder.

    Args:
        run: In the state that `restore` has made.
        data: Its loaders.
        folder: Its folder, opened.
        stop: Ends the run at the next batch, with a checkpoint.
        scalar_logs: Get each row of summary.csv.

    Raises:
        Stopped: The run was asked to stop.
        UserError: A file cannot be written, or an image cannot be read.
    """
    trainer, place, every = run.trainer, run.trainer.placement, run.intervals
    position = run.position
    begin = run.state if 'rng' in run.state else _resume_state(run, data)  # of the epoch: state of the generators
    for epoch in range(run.start_epoch, run.num_epochs):
        watch = Watch(stop, place, every.recovery, _keeper(run, folder, epoch, begin), position)
        data.start_epoch(epoch, mixes=not every.mixing or epoch < every.mixing)
        train_metrics = trainer.train_epoch(data.train_loader, epoch, run.num_epochs, every.log, watch)
        if not position.validates:
            _share_statistics(trainer.model, run.dist_bn, place)
        validates, position = position.validates, Position()
        if (epoch + 1) % every.validation and epoch + 1 != run.num_epochs:
            trainer.scheduler.step(epoch + 1, metric=None)
            begin = _resume_state(run, data)
            continue

        eval_metrics = None
        if data.eval_loader is not None:
            for name, eval_model in run.eval_models.items():
                if name and not validates:
                    _share_statistics(eval_model, run.dist_bn, place)
            check = watch.validation()
            for name, eval_model in run.eval_models.items():
                eval_metrics = evaluate(
                    eval_model, data.eval_loader, place, f'Validate{name}', every.log, after_batch=check)
        latest = (eval_metrics or train_metrics)[run.metric]
        begin = _resume_state(run, data, latest)
        folder.save_state(epoch, begin)
        if place.distributed:
            torch.distributed.barrier()  # the checkpoint comes last: all that belongs to it is there then
        if place.primary:
            rates = [group['lr'] for group in trainer.optimizer.param_groups]
            rate = sum(rates) / len(rates)
            row = folder.save_epoch(epoch, train_metrics, eval_metrics, rate, _content(run))
            _log_epoch(f'Epoch {epoch + 1}/{run.num_epochs}', train_metrics, eval_metrics, rate)
            for log in scalar_logs:
                log(row)
        trainer.scheduler.step(epoch + 1, latest)


def restore(run: Run, data: TrainData, sched: str, on_updates: bool) -> None:
    """Put schedule and random number generators into the state that belongs to a checkpoint.

    Args:
        run: Begins at `start_epoch`, with `state`.
        data: Its loaders, whose workers have generators of their own.
        sched: Name of the schedule.
        on_updates: The schedule counts updates, not epochs.

    Raises:
        UserError: The state is damaged, or of another schedule.
    """
    scheduler, epoch, state = run.trainer.scheduler, run.start_epoch, run.state
    place = run.trainer.placement
    batches = run.position.batches
    plateau = [state.get('plateau')]
    if place.distributed:
        torch.distributed.broadcast_object_list(plateau)  # a process that is new has none
    if on_updates and (epoch > 0 or batches):
        updates = math.ceil(batches / run.trainer.accum_steps)
        scheduler.step_update(epoch * run.updates_per_epoch + updates)
    elif epoch > 0 and sched != 'plateau':
        scheduler.step(epoch)
    elif epoch > 0 and plateau[0] is not None:
        with blame('--resume: the state of the schedule', *STATE_ERRORS):
            lr_scheduler, scheduler.restore_lr, metric = plateau[0]
            scheduler.lr_scheduler.load_state_dict(lr_scheduler)
            if not batches:
                scheduler.step(epoch, metric)
    with blame(f'--resume: damaged state of process {place.rank} beside the checkpoint', *STATE_ERRORS):
        for model, buffers in zip(_averaging(run.trainer), state.get('buffers', [])):
            model.load_state_dict(buffers, strict=False)  # DDP has just given all those of the first process
        for generator, generator_state in zip(_generators(run.trainer.optimizer), state.get('optimizer', [])):
            generator.set_state(generator_state)
        data.track(state)
        if 'rng' in state:
            set_rng_state(state['rng'])


def _resume_state(run: Run, data: TrainData, latest: Optional[float] = None) -> Dict[str, Any]:
    """All that `restore` puts back, after an epoch with a metric."""
    state = dict(rng=get_rng_state(), **data.states(), **_own_state(run, latest))
    if not run.dist_bn:  # each process has running statistics of its own
        state.update(buffers=_buffers(run.trainer))
    return state


def _own_state(run: Run, latest: Optional[float]) -> Dict[str, Any]:
    """What schedule and optimizer have besides the state that they tell.

    Of the one schedule that has a memory: it, the learning rates without their noise, and the metric that it has not
    seen yet. Of optimizers that draw random numbers: their generators.
    """
    scheduler, state = run.trainer.scheduler, {}
    if hasattr(scheduler, 'lr_scheduler'):
        state.update(plateau=(scheduler.lr_scheduler.state_dict(), scheduler.restore_lr, latest))
    generators = _generators(run.trainer.optimizer)
    if generators:
        state.update(optimizer=[generator.get_state() for generator in generators])
    return state


def _generators(optimizer: torch.optim.Optimizer) -> List[torch.Generator]:
    """Random number generators of an optimizer, and of one that it wraps."""
    found = []
    for value in vars(optimizer).values():
        if isinstance(value, torch.Generator):
            found.append(value)
        elif isinstance(value, torch.optim.Optimizer):
            found += _generators(value)
    return found


def _buffers(trainer: Trainer) -> List[Dict[str, torch.Tensor]]:
    """Running statistics of this process."""
    return [{name: buffer.cpu() for name, buffer in model.named_buffers()} for model in _averaging(trainer)]


def _content(run: Run) -> Dict[str, Any]:
    """What a checkpoint holds beside epoch and metric, as timm's scripts write and read it."""
    trainer = run.trainer
    content = dict(
        run.origin,
        state_dict=utils.get_state_dict(trainer.model),
        optimizer=trainer.optimizer.state_dict(),
    )
    if trainer.loss_scaler is not None:
        content[trainer.loss_scaler.state_dict_key] = trainer.loss_scaler.state_dict()
    if trainer.model_ema is not None:
        content['state_dict_ema'] = utils.get_state_dict(trainer.model_ema)
    return content


def _averaging(trainer: Trainer) -> List[nn.Module]:
    """Networks whose running statistics are each process's own until the end of an epoch: the model, and its EMA."""
    return [utils.unwrap_model(model) for model in (trainer.model, trainer.model_ema) if model is not None]


def _keeper(run: Run, folder: RunFolder, epoch: int, begin: Dict[str, Any]) -> Callable[[Position], None]:
    """What keeps a position within an epoch whose generators began as `begin` says."""
    place = run.trainer.placement

    def keep(position: Position) -> None:
        state = {key: begin[key] for key in ('rng', 'train_workers', 'eval_workers')}
        state.update(position=vars(position), buffers=_buffers(run.trainer), **_own_state(run, None))
        folder.save_recovery_state(epoch, position.batches, state)
        if place.distributed:
            torch.distributed.barrier()
        if place.primary:
            path = folder.save_recovery(epoch, position.batches, _content(run))
            _logger.info(f'Epoch {epoch + 1}, batch {position.batches}: {path}')

    return keep


def _share_statistics(model: nn.Module, how: str, place: Placement) -> None:
    """Give all processes the same running statistics of batch norm: 'reduce', 'broadcast' or, if empty, not."""
    if place.distributed and how:
        utils.distribute_bn(model, place.world_size, how == 'reduce')


def _log_epoch(
        label: str,
        train_metrics: Dict[str, float],
        eval_metrics: Optional[Dict[str, float]],
        learning_rate: float,
) -> None:
    _logger.info('  '.join([
        label,
        f'train loss {train_metrics["loss"]:.4f}',
        *(f'{name} {value:.4f}' for name, value in (eval_metrics or {}).items()),
        f'lr {learning_rate:.3g}',
    ]))
