"""Statistics of the layer attentions over a dataset: measured in one pass, as a table and as CSV."""
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn

from ..common.device import Placement
from ..common.errors import UserError
from ..common.evaluation import batches_on_device
from ..common.files import write_csv
from ..common.progress import Progress
from ..common.table import format_columns
from .attention import attention_modules, record_attention, stack_attention
from .classes import short_name
from .moments import Moments

__all__ = ['format_table', 'measure_attention', 'write_statistics']


def measure_attention(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        log_interval: int = 50,
        channels: bool = False,
) -> Moments:
    """Statistics of the layer attentions of each class, over the images of all processes; one batch at a time.

    Args:
        model: RLA network with K classes and L blocks, on its device.
        loader: Validation loader of this process, of batches [B, in_chans, H, W] with labels [B] in [0, K).
        placement: Where the model is.
        log_interval: Batches between lines of a log.
        channels: Of RLA-vector, follow each channel of each block, one block after the other, instead of the mean over
            the channels.

    Returns:
        Moments of K classes and L blocks, or of all their channels.

    Raises:
        UserError: A label is not a class of the model.
        ValueError: The model has no layer attention.
    """
    num_classes = model.num_classes
    heads = attention_modules(model).values()
    columns = sum(head.fc2.out_features for head in heads) if channels else len(heads)
    moments = Moments.of(torch.zeros(0, columns), torch.zeros(0, dtype=torch.long), num_classes)
    model.eval()
    progress = Progress('Attention', len(loader), log_interval, 0, placement.primary)
    with torch.inference_mode(), record_attention(model) as attention, progress:
        for images, target, own in batches_on_device(loader, placement):
            with placement.blame(images), placement.autocast():
                model(images)
            target = target[:own]
            if own and not 0 <= target.min() <= target.max() < num_classes:
                raise UserError(f'labels {target.min()} to {target.max()}: the model has classes 0 to '
                                f'{num_classes - 1}')
            values = torch.cat(list(attention.values()), 1) if channels else stack_attention(attention)
            moments.add(values[:own], target)
            progress.update(len(images) * placement.world_size)
    return Moments.merge(placement.gather([moments]))


def format_table(moments: Moments, blocks: Sequence[str], names: Sequence[str]) -> str:
    """Mean, standard deviation, and the classes with the highest and the lowest mean, of each block.

    Args:
        moments: Statistics of K classes over L blocks, of one image or more.
        blocks: Names of the blocks [L].
        names: Names of the classes [K].

    Returns:
        Lines of text, the first with the names of the columns.
    """
    whole = moments.over_groups()
    mean, std = whole.mean[0].tolist(), whole.std[0].tolist()
    present = moments.count > 0
    highest = moments.mean.where(present[:, None], -torch.inf).max(0)
    lowest = moments.mean.where(present[:, None], torch.inf).min(0)
    rows: List[Tuple[str, ...]] = [('block', 'mean', 'std', 'highest class', 'lowest class')]
    for index, label in enumerate(blocks):
        ends = [f'{ends.values[index]:.4f} {short_name(names[ends.indices[index]])}' for ends in (highest, lowest)]
        rows.append((label, f'{mean[index]:.4f}', f'{std[index]:.4f}', *ends))
    return format_columns(rows, left=len(rows[0]))


def write_statistics(moments: Moments, blocks: Sequence[str], names: Sequence[str], path: Path) -> Path:
    """Write a row for each class and block, those of all images first with an empty class.

    Args:
        moments: Statistics of K classes over L blocks.
        blocks: Names of the blocks [L].
        names: Names of the classes [K].
        path: File to write.

    Returns:
        `path`.

    Raises:
        UserError: The file cannot be written.
    """
    groups = [('', 'all', moments.over_groups(), 0)]
    groups += [(k, name, moments, k) for k, name in enumerate(names) if moments.count[k] > 0]
    rows = [
        [label, name, block, int(group.count[k]), mean, std] for label, name, group, k in groups
        for block, mean, std in zip(blocks, group.mean[k].tolist(), group.std[k].tolist())
    ]
    return write_csv(path, ['class', 'name', 'block', 'images', 'mean', 'std'], rows, '--output')
