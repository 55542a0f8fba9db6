"""One pass of validation."""
import math
from collections import OrderedDict
from typing import Any, Callable, List, Optional

import torch
import torch.nn as nn
from timm import utils

from .device import Placement
from .progress import Progress

__all__ = ['evaluate', 'images_of_process']


def images_of_process(loader: Any, placement: Placement) -> float:
    """How many images are this process's own: after them timm's sampler repeats some, for all to have as many."""
    dataset = getattr(loader, 'dataset', None)
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        return math.inf
    return len(range(placement.rank, len(dataset), placement.world_size))


def evaluate(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        label: str = 'Validate',
        log_interval: int = 50,
        predictions: Optional[List[torch.Tensor]] = None,
        after_batch: Callable[[], None] = lambda: None,
) -> 'OrderedDict[str, float]':
    """Evaluate a model.

    Args:
        model: Classifier, on its device.
        loader: Validation loader of this process.
        placement: Where the model is.
        label: What the progress is shown as.
        log_interval: Batches between lines of a log.
        predictions: List that takes labels and predictions of this process's own images, [2, B] of each batch.
        after_batch: Called after each batch.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` accuracy in percent, over all processes.
    """
    loss_fn = nn.CrossEntropyLoss()
    meters = OrderedDict((name, utils.AverageMeter()) for name in ('loss', 'top1', 'top5'))
    left = images_of_process(loader, placement)
    model.eval()
    with torch.inference_mode(), Progress(label, len(loader), log_interval, 0, placement.primary) as progress:
        for images, target in loader:
            images, target = placement.place_batch(images, target)
            with placement.autocast():
                output = model(images)
                loss = loss_fn(output, target)
            if predictions is not None:
                count = min(len(images), left)
                left -= count
                predictions.append(torch.stack([target, output.argmax(1)])[:, :count].cpu())
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
            after_batch()
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
