"""A training run from its options to its last checkpoint."""
import argparse
import importlib
import logging
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg, safe_model_name

from ..common.checkpoint import load_weights, read_checkpoint
from ..common.datasets import describe_dataset
from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.evaluation import evaluate
from ..common.files import file_digest
from ..common.networks import SAVED, compile_model, saved_arguments
from ..common.options import input_spec, placement
from ..common.stopping import StopRequest
from ..common.trained import completed_epochs
from .checkpoints import Checkpoints
from .data import Splits, TrainData, create_loaders, open_splits
from .epoch import Trainer
from .folder import RunFolder
from .options import data_spec, loss_arguments, model_arguments, split_spec
from .recovery import Position, Watch
from .rng import get_rng_state, set_rng_state
from .scalars import ScalarLog, open_scalar_logs
from .setup import (
    create_loss,
    create_network,
    create_optimizer,
    create_schedule,
    distribute,
    scaled_learning_rate,
)

__all__ = ['train']

_logger = logging.getLogger(__name__)

STATE_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # that damaged states lead to


def train(options: argparse.Namespace) -> Path:
    """Train as the options say. The order of steps, and so of random numbers, is that of timm's train.py.

    Args:
        options: As from `train_parser` and `parse`.

    Returns:
        Folder of the run, with checkpoints, args.yaml and summary.csv.

    Raises:
        UserError: Bad input; nothing has been written then, or only whole epochs.
    """
    args = argparse.Namespace(**vars(options))  # what is resolved below goes into the checkpoints
    for module in args.device_modules or []:
        with blame(f'--device-modules {module}', ImportError):
            importlib.import_module(module)
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    place = placement(args)
    vars(args).update(  # as timm's scripts have them in their checkpoints
        data_dir=args.data_dir or args.data, distributed=place.distributed, world_size=place.world_size,
        rank=place.rank, local_rank=place.local_rank, prefetcher=not args.no_prefetcher)
    utils.random_seed(args.seed, place.rank)

    in_chans = _input_channels(args)
    splits = open_splits(split_spec(args), in_chans, args.num_classes)
    _take_classes(splits, args, place)
    model = create_network(
        args.model, args.model_kwargs, model_arguments(args), args.pretrained_path, args.initial_checkpoint,
        args.head_init_scale, args.head_init_bias, args.grad_checkpointing)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    data_config = input_spec(args).resolve(model, verbose=place.primary)
    if data_config['input_size'][0] != in_chans:  # of a model from the Hub: nothing said so before it was there
        splits = open_splits(split_spec(args), data_config['input_size'][0], args.num_classes)
    _keep_architecture(args, model, data_config)
    folder = RunFolder(
        _run_dir(args.output, args.experiment, args.resume, args.model, data_config, place), place.rank,
        place.world_size)
    with folder.locked():
        _train_in(folder, args, options, model, splits, data_config, place)
    return folder.path


def _train_in(
        folder: RunFolder,
        args: argparse.Namespace,
        options: argparse.Namespace,  # as they were given, for args.yaml
        model: nn.Module,
        splits: Splits,
        data_config: Dict[str, Any],
        place: Placement,
) -> None:
    """Train in a folder that is locked."""
    checkpoint = _agreed_checkpoint(folder, args.resume, place)
    if place.primary:
        _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.num_classes} '
                     f'classes, {place.world_size} x {place.device.type}')
    place.place_model(model)
    if place.distributed and args.sync_bn:
        args.dist_bn = ''  # running statistics are the same in all processes already
        model = convert_sync_batchnorm(model)

    spec = data_spec(args, args.num_classes, data_config['interpolation'])
    data = create_loaders(splits, spec, data_config, place)
    run = _prepare(args, model, data, checkpoint, folder, place)
    scalar_logs: List[ScalarLog] = []
    if place.primary:
        scalar_logs = open_scalar_logs(args, folder.path, run.start_epoch)
        checkpoints = Checkpoints(folder.path, args.checkpoint_hist, decreasing=run.metric == 'loss')
        folder.open(checkpoints, yaml.safe_dump(vars(options)), run.metric)
        if checkpoint is not None and folder.holds(checkpoint):
            folder.go_on(checkpoint, run.start_epoch)
        _announce(run, folder, checkpoint, args)
    _restore(run, data, args.sched, args.sched_on_updates)
    with StopRequest() as stop:
        _run_epochs(run, data, folder, args, stop, scalar_logs)

    if place.distributed:
        torch.distributed.destroy_process_group()
    if place.primary and folder.checkpoints.best is not None:
        epoch, metric = folder.checkpoints.best
        _logger.info(f'Best {run.metric} {metric:.4f} in epoch {epoch + 1}; checkpoints in {folder.path}')


def _keep_architecture(args: argparse.Namespace, model: nn.Module, data_config: Dict[str, Any]) -> None:
    """Put what a saved model is into the options, so that its checkpoints need nothing but themselves."""
    if args.model.startswith(SAVED):
        vars(args).update(
            model=model.pretrained_cfg['architecture'],
            model_kwargs={**saved_arguments(args.model), **args.model_kwargs},
            **{key: data_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')})


def _agreed_checkpoint(folder: RunFolder, resume: str, place: Placement) -> Optional[Path]:
    """Checkpoint to go on from, which the first process chooses for all.

    Raises:
        UserError: Another process has another file of that name, or none.
    """
    found: List[Any] = [None, None]
    if place.primary:
        checkpoint = folder.find_checkpoint(resume)
        found = [checkpoint, file_digest(checkpoint) if checkpoint and place.distributed else None]
    if place.distributed:
        torch.distributed.broadcast_object_list(found)
        checkpoint, digest = found
        if checkpoint is not None and not place.primary and (
                not checkpoint.is_file() or file_digest(checkpoint) != digest):
            raise UserError(f'--resume {checkpoint}: not the same file as in the first process; the folder of a run '
                            'must be shared by all')
    return found[0]


def _input_channels(args: argparse.Namespace) -> int:
    """Channels of the images, as far as the options and the name of the model tell."""
    config = get_pretrained_cfg(args.model, allow_unregistered=True)
    return input_spec(args).channels or (config.input_size[0] if config is not None else 3)


def _take_classes(splits: Splits, args: argparse.Namespace, place: Placement) -> None:
    """Say what was found, and put the number of classes, if it was not given, and their names into the options."""
    found = args.num_classes is None and splits.num_classes is not None
    if found:
        args.num_classes = splits.num_classes
    args.label_names = splits.label_names  # for who reads the checkpoints; timm's scripts pass over it
    if place.primary:
        for dataset, split in zip(splits, (args.train_split, args.val_split)):
            if dataset is not None:
                _logger.info(describe_dataset(dataset, split))
        if found:
            _logger.info(f'--num-classes is not given: {args.num_classes}, those of the data')


def _run_dir(
        output: str,
        experiment: str,
        resume: str,
        model: str,
        data_config: Dict[str, Any],
        place: Placement,
) -> Path:
    if resume == 'auto' and not experiment:
        raise UserError('--resume auto: needs --experiment, the name of the run to go on with')
    time, size = datetime.now().strftime('%Y%m%d-%H%M%S'), data_config['input_size'][-1]
    names = [experiment or f'{time}-{safe_model_name(model)}-{size}']
    if place.distributed:
        torch.distributed.broadcast_object_list(names)  # clocks differ
    return Path(output or './output/train') / names[0]


@dataclass
class _Run:
    trainer: Trainer
    eval_models: Dict[str, nn.Module]  # by what is added to the label of their progress
    metric: str  # of the best checkpoint
    start_epoch: int
    num_epochs: int
    updates_per_epoch: int
    state: Dict[str, Any]  # what this process left beside the checkpoint that the run goes on from


def _prepare(
        args: argparse.Namespace,  # timm's optimizers and schedules read their options from it
        model: nn.Module,
        data: TrainData,
        checkpoint: Optional[Path],
        folder: RunFolder,
        place: Placement,
) -> _Run:
    """Loss, optimizer and schedule, the state of a checkpoint, and the model compiled and distributed."""
    updates_per_epoch = math.ceil(len(data.train_loader) / args.grad_accum_steps)
    metric = args.eval_metric if data.eval_loader is not None else 'loss'
    loss_fn = create_loss(args.smoothing, data.mixes, loss_arguments(args)).to(device=place.device)
    if not args.lr:
        args.lr = scaled_learning_rate(
            args.lr_base, args.lr_base_size, args.lr_base_scale, args.opt,
            args.batch_size * place.world_size * args.grad_accum_steps)
    optimizer = create_optimizer(model, args)
    scheduler, num_epochs = create_schedule(optimizer, args, metric, updates_per_epoch)
    if args.start_epoch is not None and args.start_epoch >= num_epochs:
        raise UserError(f'--start-epoch {args.start_epoch}: must be below the {num_epochs} epochs of the run')
    loss_scaler = None
    if place.autocast_dtype is torch.float16 and place.device.type == 'cuda':
        loss_scaler = utils.NativeScaler(device=place.device.type)

    source, content, state = f'--resume {checkpoint}', {}, {}
    if checkpoint is not None:
        content = read_checkpoint(str(checkpoint), '--resume')
        load_weights(model, content, source)
        if not args.no_resume_opt:
            _load_optimizer(content, source, optimizer, loss_scaler)
    start_epoch = completed_epochs(content, source) if args.start_epoch is None else args.start_epoch
    if checkpoint is not None and start_epoch == completed_epochs(content, source):
        state = folder.resume_state(checkpoint, content, start_epoch)
    model_ema = None
    if args.model_ema:
        model_ema = utils.ModelEmaV3(
            model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None)
        if content:
            load_weights(model_ema.module, content, source, use_ema=True)
    del content  # the size of three models

    model = compile_model(model, args.torchcompile, args.torchcompile_mode)
    eval_models = {'': model}
    if model_ema is not None and not args.model_ema_force_cpu:
        eval_models[' EMA'] = compile_model(model_ema.module, args.torchcompile, args.torchcompile_mode)
    trainer = Trainer(
        distribute(model, place, not args.no_ddp_bb), optimizer, scheduler, loss_fn, place, args.grad_accum_steps,
        args.clip_grad, args.clip_mode, loss_scaler, model_ema, data.mixup)
    return _Run(trainer, eval_models, metric, start_epoch, num_epochs, updates_per_epoch, state)


def _announce(run: _Run, folder: RunFolder, checkpoint: Optional[Path], args: argparse.Namespace) -> None:
    """Say what is about to happen, and what is odd about it."""
    if args.resume == 'auto' and checkpoint is None:
        _logger.info(f'--resume auto: no checkpoint in {folder.path}, the run begins anew')
    if run.start_epoch >= run.num_epochs:
        _logger.warning(f'Nothing is left to do: {checkpoint} is at epoch {run.start_epoch} of '
                        f'{run.num_epochs}')
        return
    within = f', going on behind batch {run.state["position"]["batches"]}' if 'position' in run.state else ''
    _logger.info(f'Epochs {run.start_epoch + 1} to {run.num_epochs}{within}, learning rate {args.lr:.4g}, into '
                 f'{folder.path}')
    if args.warmup_epochs >= run.num_epochs > 0 and not args.warmup_prefix:
        _logger.warning(f'--warmup-epochs {args.warmup_epochs}: all of the {run.num_epochs} epochs are warm-up, the '
                        'learning rate is never reached')


def _load_optimizer(
        checkpoint: Dict[str, Any],
        source: str,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[utils.NativeScaler],
) -> None:
    with blame(f'{source}: state of the optimizer', *STATE_ERRORS):
        if 'optimizer' in checkpoint:
            optimizer.load_state_dict(checkpoint['optimizer'])
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if torch.is_tensor(value) and value.ndim == parameter.ndim > 0 and value.shape != parameter.shape:
                        raise ValueError(f'{name} of shape {list(value.shape)} for weights {list(parameter.shape)}')
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])


def _content(run: _Run, args: argparse.Namespace) -> Dict[str, Any]:
    """What a checkpoint holds beside epoch and metric, as timm's scripts write and read it."""
    trainer = run.trainer
    content = dict(
        arch=args.model,
        args=args,
        state_dict=utils.get_state_dict(trainer.model),
        optimizer=trainer.optimizer.state_dict(),
    )
    if trainer.loss_scaler is not None:
        content[trainer.loss_scaler.state_dict_key] = trainer.loss_scaler.state_dict()
    if trainer.model_ema is not None:
        content['state_dict_ema'] = utils.get_state_dict(trainer.model_ema)
    return content


def _restore(run: _Run, data: TrainData, sched: str, on_updates: bool) -> None:
    """Put schedule and random number generators into the state that belongs to a checkpoint."""
    scheduler, epoch, state = run.trainer.scheduler, run.start_epoch, run.state
    place = run.trainer.placement
    batches = state['position']['batches'] if 'position' in state else 0
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
            lr_scheduler, metric = plateau[0]
            scheduler.lr_scheduler.load_state_dict(lr_scheduler)
            if 'position' not in state:
                scheduler.step(epoch, metric)
    with blame('--resume: the state of the process', *STATE_ERRORS):
        for model, buffers in zip(_averaging(run.trainer), state.get('buffers', [])):
            model.load_state_dict(buffers, strict=False)  # DDP has just given all those of the first process
        data.track(state)
        if 'rng' in state:
            set_rng_state(state['rng'])


def _resume_state(run: _Run, data: TrainData, latest: Optional[float] = None) -> Dict[str, Any]:
    """All that `_restore` puts back, after an epoch with a metric."""
    return dict(rng=get_rng_state(), **data.states(), **_plateau(run, latest))


def _plateau(run: _Run, latest: Optional[float]) -> Dict[str, Any]:
    """State of the one schedule that has a memory, and the metric that it has not seen yet."""
    scheduler = run.trainer.scheduler
    return dict(plateau=(scheduler.lr_scheduler.state_dict(), latest)) if hasattr(scheduler, 'lr_scheduler') else {}


def _run_epochs(
        run: _Run,
        data: TrainData,
        folder: RunFolder,
        args: argparse.Namespace,
        stop: StopRequest,
        scalar_logs: Sequence[ScalarLog] = (),
) -> None:
    trainer, place = run.trainer, run.trainer.placement
    position = Position(**run.state.get('position', {}))
    begin = run.state if 'rng' in run.state else _resume_state(run, data)  # of the epoch: state of the generators
    for epoch in range(run.start_epoch, run.num_epochs):
        watch = Watch(stop, place, args.recovery_interval, _keeper(run, folder, args, epoch, begin), position)
        data.start_epoch(epoch, mixes=not args.mixup_off_epoch or epoch < args.mixup_off_epoch)
        train_metrics = trainer.train_epoch(data.train_loader, epoch, run.num_epochs, args.log_interval, watch)
        if not position.validates:
            _share_statistics(trainer.model, args.dist_bn, place)
        validates, position = position.validates, Position()
        if (epoch + 1) % args.val_interval and epoch + 1 != run.num_epochs:
            trainer.scheduler.step(epoch + 1, metric=None)
            begin = _resume_state(run, data)
            continue

        eval_metrics = None
        if data.eval_loader is not None:
            for name, eval_model in run.eval_models.items():
                if name and not validates:
                    _share_statistics(eval_model, args.dist_bn, place)
            check = watch.validation()
            for name, eval_model in run.eval_models.items():
                eval_metrics = evaluate(
                    eval_model, data.eval_loader, place, f'Validate{name}', args.log_interval, after_batch=check)
        latest = (eval_metrics or train_metrics)[run.metric]
        begin = _resume_state(run, data, latest)
        folder.save_state(epoch, begin)
        if place.distributed:
            torch.distributed.barrier()  # the checkpoint comes last: all that belongs to it is there then
        if place.primary:
            rates = [group['lr'] for group in trainer.optimizer.param_groups]
            rate = sum(rates) / len(rates)
            row = folder.save_epoch(epoch, train_metrics, eval_metrics, rate, _content(run, args))
            _log_epoch(f'Epoch {epoch + 1}/{run.num_epochs}', train_metrics, eval_metrics, rate)
            for log in scalar_logs:
                log(row)
        trainer.scheduler.step(epoch + 1, latest)


def _averaging(trainer: Trainer) -> List[nn.Module]:
    """Networks whose running statistics are each process's own until the end of an epoch: the model, and its EMA."""
    return [utils.unwrap_model(model) for model in (trainer.model, trainer.model_ema) if model is not None]


def _keeper(
        run: _Run,
        folder: RunFolder,
        args: argparse.Namespace,
        epoch: int,
        begin: Dict[str, Any],
) -> Callable[[Position], None]:
    """What keeps a position within an epoch whose generators began as `begin` says."""
    place = run.trainer.placement

    def keep(position: Position) -> None:
        buffers = [{name: buffer.cpu() for name, buffer in model.named_buffers()} for model in _averaging(run.trainer)]
        state = {key: begin[key] for key in ('rng', 'train_workers', 'eval_workers')}
        state.update(position=vars(position), buffers=buffers, **_plateau(run, None))
        folder.save_recovery_state(epoch, position.batches, state)
        if place.distributed:
            torch.distributed.barrier()
        if place.primary:
            path = folder.save_recovery(epoch, position.batches, _content(run, args))
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
