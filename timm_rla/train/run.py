"""`timm-rla train`: a training run from its options to its last checkpoint."""
import argparse
import importlib
import logging
import math
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.parallel import DistributedDataParallel

from .._timm import file_checkpoint
from ..errors import UserError, blame, closest
from . import resume
from .data import create_eval_loader, create_train_loader, is_mixing
from .engine import train_one_epoch, validate
from .options import parse, train_parser
from .rng import RngTracker, get_rng_state, set_rng_state
from .setup import build_autocast, build_model, input_channels, load_weights, read_checkpoint, setup_device

__all__ = ['main', 'train']

_logger = logging.getLogger(__name__)

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly')


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    utils.setup_default_logging()
    train(parse(train_parser(), argv))


def _create_model(args: argparse.Namespace) -> nn.Module:
    overlay = {}
    if args.pretrained_path:
        if not Path(args.pretrained_path).is_file():
            raise UserError(f'--pretrained-path {args.pretrained_path}: no such file')
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # -1: adapt the head
    model = build_model(
        args,
        pretrained=args.pretrained,
        in_chans=input_channels(args),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **overlay,
    )
    if args.initial_checkpoint:
        weights = read_checkpoint(args.initial_checkpoint, '--initial-checkpoint')
        load_weights(model, weights, f'--initial-checkpoint {args.initial_checkpoint}', use_ema=True)
    with torch.no_grad():
        if args.head_init_scale is not None:
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def _create_loss(args: argparse.Namespace) -> nn.Module:
    mixing = is_mixing(args)
    if args.bce_loss and (mixing or args.smoothing):
        return BinaryCrossEntropy(
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
            **({} if mixing else dict(smoothing=args.smoothing)),
        )
    if mixing:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def _scale_lr(args: argparse.Namespace) -> None:
    """Learning rate from --lr-base and the global batch size, where --lr does not give it."""
    if args.lr:
        return
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def _create_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        metric: str,
        updates_per_epoch: int,
) -> Tuple[Any, int]:
    if args.sched not in SCHEDULES:  # older versions of timm would train without a schedule
        raise UserError(f'--sched {args.sched}: no such schedule; there are {", ".join(SCHEDULES)}')
    with blame(f'--sched {args.sched}'):
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )


def _run_dir(args: argparse.Namespace, data_config: Dict[str, Any]) -> Path:
    names = [args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])]
    if args.distributed:
        torch.distributed.broadcast_object_list(names)  # clocks differ
    return Path(args.output or './output/train') / names[0]


def _find_checkpoint(args: argparse.Namespace, run_dir: Path) -> Optional[Path]:
    """Checkpoint to go on from, None for a fresh start. A run that is there already is never written over."""
    checkpoint = None
    if args.resume == 'auto':
        if not args.experiment:
            raise UserError('--resume auto: needs --experiment, the name of the run to go on with')
        checkpoint = resume.find_last(run_dir)
        if checkpoint is None:
            return None  # killed before its first checkpoint, or not begun
    elif args.resume:
        checkpoint = Path(args.resume)
        if not checkpoint.is_file():
            raise UserError(f'--resume {checkpoint}: no such file')
    if (run_dir / resume.SUMMARY).exists() and (checkpoint is None or checkpoint.parent.resolve() != run_dir.resolve()):
        raise UserError(f'--experiment {args.experiment}: {run_dir} holds a run; --resume auto goes on with it')
    return checkpoint


def _load_optimizer(
        checkpoint: Dict[str, Any],
        source: str,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[utils.NativeScaler],
) -> None:
    with blame(source):
        if 'optimizer' in checkpoint:
            optimizer.load_state_dict(checkpoint['optimizer'])
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])


def _continue_run(saver: utils.CheckpointSaver, checkpoint: Path, start_epoch: int, metric: str) -> None:
    """Bring the folder of a run that was killed at any point into the state right after one of its checkpoints."""
    resume.trim_summary(checkpoint.parent, start_epoch)
    *before, last = resume.read_summary(checkpoint.parent) or [None]
    if last is None:
        return
    resume.restore_saver(saver, checkpoint.parent, before, metric)
    # the saver may have been killed before it had made copies of the checkpoint and dropped a worse one
    file_checkpoint(saver, checkpoint, int(last['epoch']), last[resume.metric_key(last, metric)])


def _start_schedule(scheduler: Any, epoch: int, updates_per_epoch: int, args: argparse.Namespace, last: Any) -> None:
    """Set the learning rate of the first epoch of a run that goes on."""
    if epoch <= 0:
        return
    if args.sched_on_updates:
        scheduler.step_update(epoch * updates_per_epoch)
    elif args.sched != 'plateau':
        scheduler.step(epoch)
    elif last is not None:  # the one schedule that has a memory
        plateau, metric = last
        scheduler.lr_scheduler.load_state_dict(plateau)
        scheduler.step(epoch, metric)


def train(args: argparse.Namespace) -> Path:
    """Train as the options say. The order of steps, and so of random numbers, is that of timm's train.py.

    Args:
        args: Options, as `parse` returns them.

    Returns:
        Folder of the run, with checkpoints, args.yaml and summary.csv.

    Raises:
        UserError: Bad input; nothing has been written then, or only whole epochs.
    """
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    for module in args.device_modules or []:
        with blame(f'--device-modules {module}'):
            importlib.import_module(module)
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    args.data_dir = args.data_dir or args.data
    device = setup_device(args)
    primary = utils.is_primary(args)
    utils.random_seed(args.seed, args.rank)

    model = _create_model(args)
    with blame('model input'):
        data_config = resolve_data_config(vars(args), model=model, verbose=False)
    run_dir = _run_dir(args, data_config)
    checkpoint = _find_checkpoint(args, run_dir)
    if primary:
        _logger.info(f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.num_classes} '
                     f'classes, {args.world_size} x {device.type}')
        _logger.info('Input: ' + ', '.join(f'{key} {value}' for key, value in data_config.items()))

    model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # running statistics are the same in all processes already
        model = convert_sync_batchnorm(model)

    train_loader, mixup = create_train_loader(args, data_config, device)
    eval_loader = None
    if args.val_split:
        eval_loader = create_eval_loader(
            args,
            data_config,
            device,
            args.val_split,
            args.validation_batch_size or args.batch_size,
            num_samples=args.val_num_samples,
            train_dataset=train_loader.dataset,
        )
    updates_per_epoch = math.ceil(len(train_loader) / args.grad_accum_steps)
    metric = args.eval_metric if eval_loader is not None else 'loss'

    loss_fn = _create_loss(args).to(device=device)
    _scale_lr(args)
    if args.opt.lower().removeprefix('lookahead_') not in list_optimizers():
        raise UserError(f'--opt {args.opt}: no such optimizer (timm.optim.list_optimizers() lists them); '
                        f'{closest(args.opt, list_optimizers())}')
    with blame(f'--opt {args.opt}'):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    scheduler, num_epochs = _create_scheduler(args, optimizer, metric, updates_per_epoch)
    autocast = build_autocast(args, device)
    loss_scaler = None
    if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
        loss_scaler = utils.NativeScaler(device=device.type)

    start_epoch, resumed, source = 0, {}, f'--resume {checkpoint}'
    if checkpoint is not None:
        resumed = read_checkpoint(str(checkpoint), '--resume')
        load_weights(model, resumed, source)
        if not args.no_resume_opt:
            _load_optimizer(resumed, source, optimizer, loss_scaler)
        start_epoch = resumed.get('epoch', -1) + 1
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
    model_ema = None
    if args.model_ema:
        model_ema = utils.ModelEmaV3(
            model,
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None,
        )
        if resumed:
            load_weights(model_ema.module, resumed, source, use_ema=True)
    del resumed  # the size of three models

    eval_models = {'': model}
    if model_ema is not None and not args.model_ema_force_cpu:
        eval_models[' EMA'] = model_ema.module
    if args.torchcompile:
        with blame(f'--torchcompile {args.torchcompile}'):
            eval_models = {
                name: torch.compile(m, backend=args.torchcompile, mode=args.torchcompile_mode)
                for name, m in eval_models.items()
            }
        model = eval_models['']
    if args.distributed:
        model = DistributedDataParallel(
            model,
            device_ids=[device] if device.type != 'cpu' else None,
            broadcast_buffers=not args.no_ddp_bb,
        )

    saver = None
    if primary:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / 'args.yaml').write_text(args_text)
        saver = utils.CheckpointSaver(
            model=model,
            optimizer=optimizer,
            args=args,
            model_ema=model_ema,
            amp_scaler=loss_scaler,
            checkpoint_dir=str(run_dir),
            recovery_dir=str(run_dir),
            decreasing=metric == 'loss',
            max_history=args.checkpoint_hist,
        )
        if checkpoint is not None and checkpoint.parent.resolve() == run_dir.resolve():
            _continue_run(saver, checkpoint, start_epoch, metric)
        _logger.info(f'Epochs {start_epoch + 1} to {num_epochs}, learning rate {args.lr:.4g}, into {run_dir}')

    memory = resume.load_resume_state(checkpoint.parent, start_epoch - 1, args.rank) if checkpoint is not None else None
    memory = memory or {}
    _start_schedule(scheduler, start_epoch, updates_per_epoch, args, memory.get('plateau'))
    train_rng = RngTracker(train_loader, memory.get('train_workers'))
    eval_rng = RngTracker(eval_loader, memory.get('eval_workers')) if eval_loader is not None else None
    if memory:
        set_rng_state(memory['rng'])

    for epoch in range(start_epoch, num_epochs):
        if hasattr(train_loader.dataset, 'set_epoch'):
            train_loader.dataset.set_epoch(epoch)
        elif hasattr(train_loader.sampler, 'set_epoch'):
            train_loader.sampler.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            train_rng.disable_mixup()
            if mixup is not None:
                mixup.mixup_enabled = False

        train_metrics = train_one_epoch(
            epoch,
            model,
            train_loader,
            optimizer,
            loss_fn,
            args,
            device,
            num_epochs,
            scheduler,
            autocast=autocast,
            loss_scaler=loss_scaler,
            model_ema=model_ema,
            mixup=mixup,
        )
        if args.distributed and args.dist_bn:
            utils.distribute_bn(model, args.world_size, args.dist_bn == 'reduce')
        if (epoch + 1) % args.val_interval and epoch + 1 != num_epochs:
            scheduler.step(epoch + 1, metric=None)
            continue

        eval_metrics = None
        if eval_loader is not None:
            for name, eval_model in eval_models.items():
                if name and args.distributed and args.dist_bn:
                    utils.distribute_bn(eval_model, args.world_size, args.dist_bn == 'reduce')
                eval_metrics = validate(eval_model, eval_loader, args, device, f'Validate{name}', autocast)
        latest = (eval_metrics or train_metrics)[metric]

        resume_state = dict(
            rng=get_rng_state(),
            train_workers=train_rng.states(),
            eval_workers=eval_rng.states() if eval_rng is not None else [],
        )
        if args.sched == 'plateau':
            resume_state['plateau'] = (scheduler.lr_scheduler.state_dict(), latest)
        run_dir.mkdir(parents=True, exist_ok=True)  # ranks other than the primary write there too
        resume.save_resume_state(run_dir, epoch, args.rank, resume_state)
        if args.distributed:
            torch.distributed.barrier()  # the checkpoint comes last: all that belongs to it is there then
        if primary:
            lrs = [group['lr'] for group in optimizer.param_groups]
            utils.update_summary(
                epoch,
                train_metrics,
                eval_metrics,
                filename=str(run_dir / resume.SUMMARY),
                lr=sum(lrs) / len(lrs),
                write_header=not (run_dir / resume.SUMMARY).exists(),
            )
            _logger.info('  '.join([
                f'Epoch {epoch + 1}/{num_epochs}',
                f'train loss {train_metrics["loss"]:.4f}',
                *(f'{name} {value:.4f}' for name, value in (eval_metrics or {}).items()),
                f'lr {sum(lrs) / len(lrs):.3g}',
            ]))
            saver.save_checkpoint(epoch, metric=latest)
        scheduler.step(epoch + 1, latest)

    if args.distributed:
        torch.distributed.destroy_process_group()
    if primary and saver.best_metric is not None:
        _logger.info(f'Best {metric} {saver.best_metric:.4f} in epoch {saver.best_epoch + 1}; checkpoints in {run_dir}')
    return run_dir
