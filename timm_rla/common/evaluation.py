"""One pass of validation."""
import math
from collections import OrderedDict
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm import utils

from .device import Placement
from .progress import Progress

__all__ = ['batches_on_device', 'evaluate', 'images_of_process']


def images_of_process(loader: Any, placement: Placement) -> float:
    """How many images are this process's own: after them timm's sampler repeats some, for all to have as many."""
    dataset = getattr(loader, 'dataset', None)
    if not placement.distributed or dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        return math.inf
    return len(range(placement.rank, len(dataset), placement.world_size))


def batches_on_device(loader: Any, placement: Placement) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
    """Batches of a loader on their device, and how many images of each are this process's own; these come first.

    Args:
        loader: Validation loader of this process.
        placement: Where the model is.
    """
    left = images_of_process(loader, placement)
    for images, target in loader:
        images, target = placement.place_batch(images, target)
        own = min(len(images), left)
        left -= own
        yield images, target, own


def _mean_of_own(output: torch.Tensor, target: torch.Tensor) -> Tuple[List[torch.Tensor], int]:
    """Loss, top1 and top5 over the images of a batch that are their processes' own, and how many these are."""
    own = len(target)
    values = [torch.zeros((), device=output.device)] * 3
    if own:
        values = [nn.functional.cross_entropy(output, target), *utils.accuracy(output, target, topk=(1, 5))]
    sums = torch.stack([value.double() * own for value in values] + [torch.tensor(own, device=output.device)])
    torch.distributed.all_reduce(sums)
    return list(sums[:-1] / sums[-1].clamp(min=1)), int(sums[-1])


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
        predictions: List that takes labels and predictions of this process's own images, [2, B] of each batch. Only
            these images count then.
        after_batch: Called after each batch.

    Returns:
        Mean cross-entropy `loss`, `top1` and `top5` accuracy in percent, over all processes.
    """
    loss_fn = nn.CrossEntropyLoss()
    meters = OrderedDict((name, utils.AverageMeter()) for name in ('loss', 'top1', 'top5'))
    model.eval()
    with torch.inference_mode(), Progress(label, len(loader), log_interval, 0, placement.primary) as progress:
        for images, target, own in batches_on_device(loader, placement):
            with placement.blame(images), placement.autocast():
                output = model(images)
                loss = loss_fn(output, target)
            count = len(images)
            if predictions is not None:
                predictions.append(torch.stack([target, output.argmax(1)])[:, :own].cpu())
            values = [loss, *utils.accuracy(output, target, topk=(1, 5))]
            if placement.distributed and predictions is not None:
                values, count = _mean_of_own(output[:own], target[:own])
            elif placement.distributed:  # as in timm's training, images that are repeated count twice
                values = [utils.reduce_tensor(value, placement.world_size) for value in values]
            for meter, value in zip(meters.values(), values):
                meter.update(value.item(), count)
            progress.update(
                len(images) * placement.world_size,
                loss=f'{meters["loss"].avg:.4f}',
                top1=f'{meters["top1"].avg:.2f} %',
            )
            after_batch()
    return OrderedDict((name, meter.avg) for name, meter in meters.items())
