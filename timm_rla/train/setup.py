"""The parts of a run, made as timm's train.py makes them: network, loss, learning rate, optimizer and schedule."""
import argparse
import inspect
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import ResNet, clean_state_dict
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.parallel import DistributedDataParallel

from ..common.checkpoint import load_weights, read_checkpoint
from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.networks import FOLDER, build_model, saved_weights
from ..common.optimizers import blame_optimizer
from ..models.network import RecurrentLayerAttention
from ..models.warm_start import checkpoint_filter_fn, differing_keys

__all__ = [
    'create_loss', 'create_network', 'create_optimizer', 'create_schedule', 'distribute', 'scaled_learning_rate',
]

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly')


def create_network(
        name: str,
        model_kwargs: Dict[str, Any],
        arguments: Dict[str, Any],
        pretrained_path: Optional[str] = None,
        initial_checkpoint: str = '',
        head_init_scale: Optional[float] = None,
        head_init_bias: Optional[float] = None,
        grad_checkpointing: bool = False,
) -> nn.Module:
    """Network to train, on the CPU.

    Args:
        name: Name of the model.
        model_kwargs: What the user gives as --model-kwargs.
        arguments: Further arguments of `timm.create_model`.
        pretrained_path: File that these arguments name.
        initial_checkpoint: Checkpoint to load after initialisation, with the classifier; none if empty. That of the
            network without layer attention is a warm start.
        head_init_scale: Factor of the classifier's weights and biases.
        head_init_bias: Bias of the classifier.
        grad_checkpointing: Recompute activations in the backward pass.

    Raises:
        UserError: Unknown model, or a file that is missing, damaged, with code in it, or of another network.
    """
    option = '--pretrained-path'
    if name.startswith(FOLDER) and arguments.get('pretrained') and not pretrained_path:
        option, pretrained_path = f'--model {FOLDER}', saved_weights(name)
        arguments = {**arguments, 'pretrained_cfg_overlay': dict(file=pretrained_path, source='')}
    if pretrained_path:  # timm reads it once more, and older versions would run code in it
        pretrained = clean_state_dict(read_checkpoint(pretrained_path, option)['state_dict'])
    model = build_model(name, model_kwargs, **arguments)
    attends = isinstance(model, RecurrentLayerAttention)
    if pretrained_path and isinstance(model, ResNet) and not attends:
        # With another number of classes timm loads as much as fits; what goes into layer attention is checked already
        differences = differing_keys(pretrained.keys(), model.state_dict().keys())
        if differences:
            raise UserError(f'{option} {pretrained_path}: weights of another network; {differences}')
    if initial_checkpoint:
        weights = read_checkpoint(initial_checkpoint, '--initial-checkpoint')
        load_weights(model, weights, f'--initial-checkpoint {initial_checkpoint}', use_ema=True,
                     filter_fn=checkpoint_filter_fn if attends else None)
    with torch.no_grad():
        if head_init_scale is not None:
            with blame(f'--head-init-scale: {name}', AttributeError):  # a network without one linear classifier
                model.get_classifier().weight.mul_(head_init_scale)
                model.get_classifier().bias.mul_(head_init_scale)
        if head_init_bias is not None:
            with blame(f'--head-init-bias: {name}', AttributeError):
                model.get_classifier().bias.fill_(head_init_bias)
    if grad_checkpointing:
        with blame(f'--grad-checkpointing: {name}', AssertionError, AttributeError):  # one that cannot
            model.set_grad_checkpointing(enable=True)
    return model


def create_loss(smoothing: float, mixes: bool, bce: Optional[Dict[str, Any]] = None) -> nn.Module:
    """Loss of training.

    Args:
        smoothing: Label smoothing.
        mixes: Targets are mixed, and smoothed by that.
        bce: Arguments of timm's `BinaryCrossEntropy`, None for cross-entropy.
    """
    if bce is not None and (mixes or smoothing):
        return BinaryCrossEntropy(**bce, **({} if mixes else dict(smoothing=smoothing)))
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing else nn.CrossEntropyLoss()


def scaled_learning_rate(base: float, base_size: int, scale: str, optimizer: str, global_batch: int) -> float:
    """Learning rate for a global batch size, from that for another.

    Args:
        base: Learning rate at a global batch of `base_size`.
        base_size: Images.
        scale: 'linear', 'sqrt', or empty for what suits the optimizer.
        optimizer: Its name.
        global_batch: Images in an optimizer step, over all processes.
    """
    scale = scale or ('sqrt' if any(name in optimizer.lower() for name in ('ada', 'lamb')) else 'linear')
    ratio = global_batch / base_size
    return base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def create_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """timm's optimizer; `options` are those that its `optimizer_kwargs` reads.

    Raises:
        UserError: No such optimizer, or arguments that it rejects.
    """
    with blame_optimizer(options.opt):
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=options), **options.opt_kwargs)


def create_schedule(
        optimizer: torch.optim.Optimizer,
        options: argparse.Namespace,
        metric: str,
        updates_per_epoch: int,
) -> Tuple[Any, int]:
    """timm's schedule, and the number of epochs; `options` are those that its `scheduler_kwargs` reads.

    Raises:
        UserError: No such schedule, or values that it rejects.
    """
    if options.sched not in SCHEDULES:  # older versions of timm would train without a schedule
        raise UserError(f'--sched {options.sched}: no such schedule; there are {", ".join(SCHEDULES)}')
    with blame(f'--sched {options.sched}', ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(options, decreasing_metric=metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )


def distribute(model: nn.Module, placement: Placement, broadcast_buffers: bool) -> nn.Module:
    """Wrap a model in DDP if there are several processes."""
    if not placement.distributed:
        return model
    names = ('forward_sync_buffers', 'broadcast_buffers')  # the second is the older name
    name = next(name for name in names if name in inspect.signature(DistributedDataParallel).parameters)
    return DistributedDataParallel(
        model,
        device_ids=[placement.device] if placement.device.type != 'cpu' else None,
        **{name: broadcast_buffers},
    )
