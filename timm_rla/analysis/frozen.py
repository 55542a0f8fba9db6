"""Mean layer attentions over a dataset, and how much accuracy depends on more than them."""
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from ..common.device import Placement
from ..common.progress import Progress
from .attention import record_attention

__all__ = ['Comparison', 'compare', 'correct_predictions', 'mean_attention']


def mean_attention(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        log_interval: int = 50,
) -> Dict[str, torch.Tensor]:
    """Mean layer attention of each block over all images of all processes; one batch at a time.

    Args:
        model: RLA network, on its device.
        loader: Loader of this process, of batches [B, in_chans, H, W] with labels.
        placement: Where the model is.
        log_interval: Batches between lines of a log.

    Returns:
        By the names of the blocks, [1] or, of RLA-vector, [C], float64 on the CPU.

    Raises:
        ValueError: The model has no layer attention.
    """
    sums: Dict[str, torch.Tensor] = {}
    count = 0
    model.eval()
    progress = Progress('Mean attention', len(loader), log_interval, 0, placement.primary)
    with torch.inference_mode(), record_attention(model) as attention, progress:
        for images, target in loader:
            images, _ = placement.place_batch(images, target)
            with placement.autocast():
                model(images)
            for name, a in attention.items():
                sums[name] = sums.get(name, 0) + a.double().sum(0).cpu()
            count += len(images)
            progress.update(len(images) * placement.world_size)
    parts: List[Any] = [(sums, count)]
    if placement.distributed:
        parts = [None] * placement.world_size
        dist.all_gather_object(parts, (sums, count))
    total = sum(part_count for _, part_count in parts)
    return {name: sum(part[name] for part, _ in parts) / total for name in sums}


def correct_predictions(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        label: str,
        log_interval: int = 50,
) -> torch.Tensor:
    """For each image of this process, in order, whether the model's first choice is its label: bool [n]."""
    correct = []
    model.eval()
    with torch.inference_mode(), Progress(label, len(loader), log_interval, 0, placement.primary) as progress:
        for images, target in loader:
            images, target = placement.place_batch(images, target)
            with placement.autocast():
                correct.append((model(images).argmax(1) == target).cpu())
            progress.update(len(images))
    return torch.cat(correct)


class Comparison(NamedTuple):
    """Top-1 accuracy of two networks on the same images, in percent, and the difference in percentage points."""
    first: float
    second: float
    difference: float  # second - first
    interval: Optional[Tuple[float, float]]  # 95 %, None with less than two images


def compare(first: torch.Tensor, second: torch.Tensor) -> Comparison:
    """Compare two networks image by image.

    The interval is that of a mean of paired differences, by the normal distribution.

    Args:
        first: Whether the first network is right, bool [n].
        second: The same of the second one.
    """
    differences = 100 * (second.double() - first.double())
    mean = differences.mean().item()
    interval = None
    if len(differences) > 1:
        half = 1.959964 * differences.std().item() / math.sqrt(len(differences))
        interval = mean - half, mean + half
    return Comparison(100 * first.double().mean().item(), 100 * second.double().mean().item(), mean, interval)
