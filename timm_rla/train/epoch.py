"""One epoch of training."""
import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn as nn
from timm import utils
from timm.data import Mixup
from timm.models import model_parameters

from ..common.device import MEMORY_ERRORS, Placement
from ..common.errors import UserError
from ..common.progress import Progress
from .recovery import Watch

__all__ = ['Trainer']


@dataclass
class Trainer:
    """What takes training steps, one by one as timm's train.py does."""
    model: nn.Module  # compiled and in DDP, if it is
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss_fn: nn.Module
    placement: Placement
    accum_steps: int = 1  # batches in an optimizer step
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    loss_scaler: Optional[utils.NativeScaler] = None
    model_ema: Optional[utils.ModelEmaV3] = None
    mixup: Optional[Mixup] = None  # where the loader does not mix

    def train_epoch(
            self,
            loader: Any,
            epoch: int,
            num_epochs: int,
            log_interval: int,
            watch: Watch,
    ) -> 'OrderedDict[str, float]':
        """Train for one epoch, from a position within it on.

        Args:
            loader: Training loader of this process.
            epoch: Index of the epoch.
            num_epochs: Epochs of the whole run, for the time that is left.
            log_interval: Batches between lines of a log.
            watch: Has the position, keeps others, and stops the run if it is asked to.

        Returns:
            The mean loss of the epoch over all processes, as `loss`.

        Raises:
            UserError: The loss is not finite, or the network cannot take the images.
            Stopped: The run was asked to stop.
        """
        self.model.train()
        losses = utils.AverageMeter()
        position = watch.position
        if position.images:
            losses.sum, losses.count = position.loss_sum, position.images
            losses.avg = losses.sum / losses.count
        num_batches = len(loader)
        last_group = num_batches - num_batches % self.accum_steps  # where an incomplete group of batches begins
        updates = epoch * math.ceil(num_batches / self.accum_steps) + math.ceil(position.batches / self.accum_steps)
        left = (num_epochs - epoch - 1) * num_batches
        label = f'Train {epoch + 1}/{num_epochs}'

        def ends_step(batch: int) -> bool:
            return batch + 1 == num_batches or (batch + 1) % self.accum_steps == 0

        self.optimizer.zero_grad()
        rest = num_batches - position.batches
        interval = log_interval * self.accum_steps
        with Progress(label, rest, interval, left, self.placement.primary) as progress:
            for batch, (images, target) in watch.batches(loader, ends_step, self.accum_steps):
                ends_group = ends_step(batch)
                group = num_batches - last_group if batch >= last_group else self.accum_steps
                loss = self._backward(images, target, group, ends_group, f'epoch {epoch}, batch {batch}')
                losses.update(loss, len(images))
                progress.update(
                    len(images) * self.placement.world_size,
                    loss=f'{losses.avg:.4f}',
                    lr=f'{self._learning_rate():.3g}',
                )
                if ends_group:
                    updates += 1
                    self.optimizer.zero_grad()
                    if self.model_ema is not None:
                        self.model_ema.update(utils.unwrap_model(self.model), step=updates)
                    self.scheduler.step_update(num_updates=updates, metric=losses.avg)
                    watch.reached(batch + 1, losses)

        if hasattr(self.optimizer, 'sync_lookahead') and not position.validates:
            self.optimizer.sync_lookahead()
        mean = losses.avg
        if self.placement.distributed:
            mean = utils.reduce_tensor(
                torch.tensor([mean], device=self.placement.device), self.placement.world_size).item()
        return OrderedDict(loss=mean)

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    def _backward(self, images: torch.Tensor, target: torch.Tensor, group: int, ends_group: bool, where: str) -> float:
        """Forward and backward pass of a batch and, at the end of its group, the optimizer step; returns the loss."""
        images, target = self.placement.place_batch(images, target)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        waits = self.placement.distributed and not ends_group
        with self.model.no_sync() if waits else nullcontext():
            with self.placement.blame(images), self.placement.autocast():
                loss = self.loss_fn(self.model(images), target)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(f'loss is {value} in {where} (learning rate {self._learning_rate():.3g}); checkpoints '
                                'of the epochs before are kept')
            with self.placement.blame(images, MEMORY_ERRORS):
                self._step(loss / group if group > 1 else loss, ends_group)
        return value

    def _step(self, loss: torch.Tensor, ends_group: bool) -> None:
        second_order = getattr(self.optimizer, 'is_second_order', False)
        parameters = model_parameters(self.model, exclude_head='agc' in self.clip_mode)
        if self.loss_scaler is not None:
            self.loss_scaler(
                loss,
                self.optimizer,
                clip_grad=self.clip_grad,
                clip_mode=self.clip_mode,
                parameters=parameters,
                create_graph=second_order,
                need_update=ends_group,
            )
            return
        loss.backward(create_graph=second_order)
        if ends_group:
            if self.clip_grad is not None:
                utils.dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)
            self.optimizer.step()
