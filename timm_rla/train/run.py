"""A training run from its options to its last checkpoint."""
import argparse
import logging
import math
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg, safe_model_name

from ..common.datasets import describe_dataset, shuffles_in_workers
from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.extras import import_modules
from ..common.files import file_digest, folder_of_run
from ..common.idle import warn_of_idle_options
from ..common.networks import SAVED, compile_model, saved_arguments
from ..common.options import input_spec, placement
from ..common.stopping import StopRequest
from .checkpoints import Checkpoints
from .data import Splits, TrainData, create_loaders, open_splits
from .epoch import Trainer
from .folder import RunFolder
from .loop import Intervals, Run, restore, run_epochs
from .options import data_spec, loss_arguments, model_arguments, split_spec, train_parser
from .resume import restore_weights
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

OF_OPTIONS = ('num_classes', 'in_chans', 'global_pool')  # arguments of networks with an option of their own
# Options that say how an epoch is cut into batches; beside them the seed of those that shuffle by it alone
CUT = ('batch_size', 'grad_accum_steps', 'in_memory', 'aug_repeats', 'epoch_repeats', 'train_num_samples')


def train(options: argparse.Namespace) -> Path:
    """Train as the options say. The order of steps, and so of random numbers, is that of timm's train.py.

    Args:
        options: As from `train_parser` and `parse`.

    Returns:
        Folder of the run, with checkpoints, args.yaml and summary.csv.

    Raises:
        UserError: Bad input; nothing has been written then, or only whole epochs.
    """
    with StopRequest(at_once=True) as stop:
        return _train(options, stop)


def _train(options: argparse.Namespace, stop: StopRequest) -> Path:
    args = argparse.Namespace(**vars(options))  # what is resolved below goes into the checkpoints
    import_modules(args.device_modules or [], '--device-modules')
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    place = placement(args)
    if place.primary:
        warn_of_idle_options(options, train_parser())
    vars(args).update(  # as timm's scripts have them in their checkpoints
        data_dir=args.data_dir or args.data, distributed=place.distributed, world_size=place.world_size,
        rank=place.rank, local_rank=place.local_rank, prefetcher=not args.no_prefetcher)
    utils.random_seed(args.seed, place.rank)

    in_chans = _input_channels(args.model, input_spec(args).channels)
    splits = open_splits(split_spec(args), in_chans, args.num_classes)
    counted = args.num_classes is None
    if counted:
        args.num_classes = splits.num_classes
    told = args.num_classes is not None
    args.label_names = splits.label_names  # for who reads the checkpoints; timm's scripts pass over it
    if place.primary:
        _describe_splits(splits, args, counted)
    model = create_network(
        args.model, args.model_kwargs, model_arguments(args), args.pretrained_path, args.initial_checkpoint,
        args.head_init_scale, args.head_init_bias, args.grad_checkpointing)
    args.num_classes = args.num_classes if told else model.num_classes
    data_config = input_spec(args).resolve(model, verbose=place.primary)
    if not told or data_config['input_size'][0] != in_chans:  # nothing said so before the model was there
        splits = open_splits(split_spec(args), data_config['input_size'][0], args.num_classes)
    vars(args).update(_saved_options(args.model, args.model_kwargs, model, data_config))
    folder = RunFolder(
        _run_dir(args.output, args.experiment, args.resume, args.model, data_config, place), place.rank,
        place.world_size, {name: getattr(args, name) for name in (*CUT, *['seed'] * args.in_memory)})
    with folder.locked():
        _train_in(folder, args, options, model, splits, data_config, place, stop)
    return folder.path


def _train_in(
        folder: RunFolder,
        args: argparse.Namespace,
        options: argparse.Namespace,  # as they were given, for args.yaml
        model: nn.Module,
        splits: Splits,
        data_config: Dict[str, Any],
        place: Placement,
        stop: StopRequest,
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
    restore(run, data, args.sched, args.sched_on_updates)  # complains before any file is changed
    if place.distributed:
        torch.distributed.barrier()  # all processes can go on
    if place.primary:
        scalar_logs = open_scalar_logs(args, folder.path, run.start_epoch)
        checkpoints = Checkpoints(folder.path, args.checkpoint_hist, decreasing=run.metric == 'loss')
        folder.open(checkpoints, yaml.safe_dump(vars(options)), run.metric)
        if checkpoint is not None and folder.holds(checkpoint):
            with blame(str(folder.path), OSError):
                folder.go_on(checkpoint, run.start_epoch, run.position.batches)
        _announce(run, folder.path, checkpoint, args.resume, args.lr, 0 if args.warmup_prefix else args.warmup_epochs)
        if run.state:
            _warn_of_other_images(data, len(run.state.get('train_workers', [])))
    stop.remember()
    run_epochs(run, data, folder, stop, scalar_logs)

    if place.distributed:
        torch.distributed.destroy_process_group()
    if place.primary and folder.checkpoints.best is not None:
        epoch, metric = folder.checkpoints.best
        _logger.info(f'Best {run.metric} {metric:.4f} in epoch {epoch + 1}; checkpoints in {folder.path}')


def _saved_options(
        name: str,
        model_kwargs: Dict[str, Any],
        model: nn.Module,
        data_config: Dict[str, Any],
) -> Dict[str, Any]:
    """Options that say what a saved model is, so that its checkpoints need nothing but themselves; else none."""
    if not name.startswith(SAVED):
        return {}
    return dict(
        model=model.pretrained_cfg['architecture'],
        model_kwargs={key: value for key, value in {**saved_arguments(name), **model_kwargs}.items()
                      if key not in OF_OPTIONS},
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


def _input_channels(model: str, given: Optional[int]) -> int:
    """Channels of the images: those that are asked for, or as far as the name of the model tells."""
    with blame(f'--model {model}', RuntimeError):  # no such tag
        config = get_pretrained_cfg(model, allow_unregistered=True)
    return given or (config.input_size[0] if config is not None else 3)


def _describe_splits(splits: Splits, args: argparse.Namespace, counted: bool) -> None:
    """Say what was found; `counted`: the number of classes was not given."""
    asked_for = ((args.train_split, args.train_num_samples), (args.val_split, args.val_num_samples))
    for dataset, (name, num_samples) in zip(splits, asked_for):
        if dataset is not None:
            _logger.info(describe_dataset(dataset, name, num_samples))
    if args.epoch_repeats and not isinstance(splits.train, torch.utils.data.IterableDataset):
        _logger.warning(f'--epoch-repeats {args.epoch_repeats:g} has no effect: it is for streams, and the split '
                        f'{args.train_split} is none')
    if counted and splits.num_classes is not None:
        _logger.info(f'--num-classes is not given: {splits.num_classes}, those of the data')


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
    return folder_of_run(output or './output/train', names[0])


def _prepare(
        args: argparse.Namespace,  # timm's optimizers and schedules read their options from it
        model: nn.Module,
        data: TrainData,
        checkpoint: Optional[Path],
        folder: RunFolder,
        place: Placement,
) -> Run:
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

    rates = [group['lr'] for group in optimizer.param_groups]  # that the schedule begins with
    start_epoch, state, model_ema = restore_weights(args, model, optimizer, loss_scaler, checkpoint, folder, place)
    if start_epoch == 0:  # else the schedule is stepped to where it goes on
        for group, rate in zip(optimizer.param_groups, rates):
            group['lr'] = rate

    model = compile_model(model, args.torchcompile, args.torchcompile_mode)
    eval_models = {'': model}
    if model_ema is not None and not args.model_ema_force_cpu:
        eval_models[' EMA'] = compile_model(model_ema.module, args.torchcompile, args.torchcompile_mode)
    trainer = Trainer(
        distribute(model, place, not args.no_ddp_bb), optimizer, scheduler, loss_fn, place, args.grad_accum_steps,
        args.clip_grad, args.clip_mode, loss_scaler, model_ema, data.mixup)
    intervals = Intervals(args.log_interval, args.recovery_interval, args.val_interval, args.mixup_off_epoch)
    return Run(trainer, eval_models, metric, start_epoch, num_epochs, updates_per_epoch, intervals, args.dist_bn,
               dict(arch=args.model, args=args), state)


def _warn_of_other_images(data: TrainData, workers: int) -> None:
    """Say why a run sees other images from here on than if it had not been interrupted.

    Args:
        data: Of the run.
        workers: How many loaded its training images before.
    """
    if data.train_rng is None:  # --in-memory, without workers
        return
    if data.train_rng.workers != workers:
        _logger.warning(f'--workers {data.train_rng.workers}: {workers} before; images are augmented with other random '
                        'numbers from here on than if the run had not been interrupted')
    if shuffles_in_workers(data.train_loader.dataset):
        _logger.warning('WebDataset and TFDS shuffle in their workers, anew from here on; samples come in another '
                        'order than if the run had not been interrupted, and some of this epoch twice or not at all')


def _announce(
        run: Run,
        folder: Path,
        checkpoint: Optional[Path],
        resume: str,
        learning_rate: float,
        warmup_epochs: int,  # of the run's epochs
) -> None:
    """Say what is about to happen, and what is odd about it."""
    if resume == 'auto' and checkpoint is None:
        _logger.info(f'--resume auto: no checkpoint in {folder}, the run begins anew')
    if run.start_epoch >= run.num_epochs:
        _logger.warning(f'Nothing is left to do: {checkpoint} is at epoch {run.start_epoch} of {run.num_epochs}')
        return
    within = f', going on behind batch {run.position.batches}' if run.position.batches else ''
    _logger.info(f'Epochs {run.start_epoch + 1} to {run.num_epochs}{within}, learning rate {learning_rate:.4g}, into '
                 f'{folder}')
    if warmup_epochs >= run.num_epochs > 0:
        _logger.warning(f'--warmup-epochs {warmup_epochs}: all of the {run.num_epochs} epochs are warm-up, the '
                        'learning rate is never reached')
