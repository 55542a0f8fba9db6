"""One pass of validation."""
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm import utils

from .device import Placement
from .progress import Progress

__all__ = ['evaluate']


def evaluate(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        label: str = 'Validate',
        log_interval: int = 50,
) -> 'OrderedDict[str, float]':
    """Evaluate a model.

    Args:
        model: Classifier, on its device.
        loader: Validation loader of this process.
        placement: Where the model is.
        label: What the progress is shown as.
        log_interval: Batches between lines of a log.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` accuracy in percent, over all processes.
    """
    loss_fn = nn.CrossEntropyLoss()
    meters = OrderedDict((name, utils.AverageMeter()) for name in ('loss', 'top1', 'top5'))
    model.eval()
    with torch.inference_mode(), Progress(label, len(loader), log_interval, 0, placement.primary) as progress:
        for images, target in loader:
            images, target = placement.place_batch(images, target)
            with placement.autocast():
                output = model(images)
                loss = loss_fn(output, target)
            values = (loss, *utils.accuracy(output, target, topk=(1, 5)))
            if placement.distributed:
                values = [utils.reduce_tensor(value, placement.world_size) for value in values]
            for meter, value in zip(meters.values(), values):
                meter.update(value.item(), len(images))
            progress.update(
                len(images) * placement.world_size,
                loss=f'{meters["loss"].avg:.4f}',
                top1=f'{meters["top1"].avg:.2f} %',
            )
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
