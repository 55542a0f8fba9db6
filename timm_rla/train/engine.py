"""One epoch of training, one pass of validation."""
import argparse
import math
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, Callable, Optional

import torch
import torch.nn as nn
from timm import utils
from timm.data import Mixup
from timm.models import model_parameters

from ..errors import UserError
from .progress import Progress
from .setup import place_batch

__all__ = ['train_one_epoch', 'validate']


def train_one_epoch(
        epoch: int,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        loss_fn: nn.Module,
        args: argparse.Namespace,
        device: torch.device,
        num_epochs: int,
        lr_scheduler: Any,
        autocast: Callable[[], Any] = nullcontext,
        loss_scaler: Optional[utils.NativeScaler] = None,
        model_ema: Optional[utils.ModelEmaV3] = None,
        mixup: Optional[Mixup] = None,
) -> 'OrderedDict[str, float]':
    """Train for one epoch, step by step as timm's train.py does.

    Returns:
        The mean loss of the epoch over all processes, as `loss`.

    Raises:
        UserError: The loss is not finite.
    """
    model.train()
    losses = utils.AverageMeter()
    num_batches = len(loader)
    accum_steps = args.grad_accum_steps
    last_group = num_batches - num_batches % accum_steps  # where an incomplete group of batches begins
    updates_per_epoch = math.ceil(num_batches / accum_steps)
    num_updates = epoch * updates_per_epoch
    second_order = getattr(optimizer, 'is_second_order', False)
    primary = utils.is_primary(args)
    left = (num_epochs - epoch - 1) * num_batches

    optimizer.zero_grad()
    with Progress(f'Train {epoch + 1}/{num_epochs}', num_batches, args.log_interval, left, primary) as progress:
        for batch, (images, target) in enumerate(loader):
            need_update = batch + 1 == num_batches or (batch + 1) % accum_steps == 0
            group = num_batches - last_group if batch >= last_group else accum_steps

            images, target = place_batch(images, target, args, device)
            if not args.prefetcher and mixup is not None:
                images, target = mixup(images, target)

            sync = nullcontext() if need_update or not args.distributed else model.no_sync()
            with sync:
                with autocast():
                    loss = loss_fn(model(images), target)
                value = loss.item()
                if not math.isfinite(value):
                    raise UserError(
                        f'loss is {value} in epoch {epoch}, batch {batch} (learning rate '
                        f'{optimizer.param_groups[0]["lr"]:.3g}); checkpoints of the epochs before are kept')
                if group > 1:
                    loss = loss / group
                if loss_scaler is not None:
                    loss_scaler(
                        loss,
                        optimizer,
                        clip_grad=args.clip_grad,
                        clip_mode=args.clip_mode,
                        parameters=model_parameters(model, exclude_head='agc' in args.clip_mode),
                        create_graph=second_order,
                        need_update=need_update,
                    )
                else:
                    loss.backward(create_graph=second_order)
                    if need_update:
                        if args.clip_grad is not None:
                            utils.dispatch_clip_grad(
                                model_parameters(model, exclude_head='agc' in args.clip_mode),
                                value=args.clip_grad,
                                mode=args.clip_mode,
                            )
                        optimizer.step()

            losses.update(value, len(images))
            progress.update(
                len(images) * args.world_size,
                loss=f'{losses.avg:.4f}',
                lr=f'{optimizer.param_groups[0]["lr"]:.3g}',
            )
            if not need_update:
                continue

            num_updates += 1
            optimizer.zero_grad()
            if model_ema is not None:
                model_ema.update(utils.unwrap_model(model), step=num_updates)
            lr_scheduler.step_update(num_updates=num_updates, metric=losses.avg)

    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()

    mean = losses.avg
    if args.distributed:
        mean = utils.reduce_tensor(torch.tensor([mean], device=device), args.world_size).item()
    return OrderedDict(loss=mean)


def validate(
        model: nn.Module,
        loader: Any,
        args: argparse.Namespace,
        device: torch.device,
        label: str = 'Validate',
        autocast: Callable[[], Any] = nullcontext,
) -> 'OrderedDict[str, float]':
    """Evaluate a model.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` accuracy in percent, over all processes.
    """
    loss_fn = nn.CrossEntropyLoss()
    meters = OrderedDict((name, utils.AverageMeter()) for name in ('loss', 'top1', 'top5'))
    model.eval()
    with torch.inference_mode(), Progress(label, len(loader), args.log_interval, 0, utils.is_primary(args)) as progress:
        for images, target in loader:
            images, target = place_batch(images, target, args, device)
            with autocast():
                output = model(images)
                loss = loss_fn(output, target)
            values = (loss, *utils.accuracy(output, target, topk=(1, 5)))
            if args.distributed:
                values = [utils.reduce_tensor(value, args.world_size) for value in values]
            for meter, value in zip(meters.values(), values):
                meter.update(value.item(), len(images))
            progress.update(
                len(images) * args.world_size,
                loss=f'{meters["loss"].avg:.4f}',
                top1=f'{meters["top1"].avg:.2f} %',
            )
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
