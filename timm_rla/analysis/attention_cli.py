"""`timm-rla attention`: layer attention over a validation set (the paper's Figure 5), as pictures, CSV and table."""
import argparse
import csv
import math
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm import utils

from ..errors import UserError, blame
from ..plotting import check_picture
from ..table import format_columns
from ..train.options import OptionParser
from ..train.progress import Progress
from ..train.setup import build_autocast, place_batch, setup_device
from ..train.trained import (
    add_data_options,
    add_model_options,
    add_precision_options,
    create_validation_loader,
    load_model,
    place_model,
)
from .attention import attention_modules, record_attention, stack_attention
from .attention_plot import block_labels, plot_attention, plot_classes
from .classes import class_names, find_class, short_name
from .moments import Moments

__all__ = ['main', 'measure_attention']


def attention_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla attention',
        description='Layer attention of each block over a dataset: mean and standard deviation, of all images and of '
                    'each class. Without --model the model and its input are those of --checkpoint. Under torchrun the '
                    'images are shared between the processes.',
    )
    add = parser.add_argument
    add_data_options(add)
    add_model_options(add)
    add_precision_options(add)
    add('--class', dest='classes', nargs='+', metavar='CLASS',
        help='classes whose curves are drawn, by index or name; the ten that differ most from the mean if not given')
    add('--output', metavar='FILE', help='picture, PNG, SVG or PDF by its ending; beside it FILE-classes with a curve '
                                         'for each class and FILE.csv; attention.png beside --checkpoint if not given')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    utils.setup_default_logging()
    args = attention_parser().parse_args(argv)
    beside = Path(args.checkpoint).parent if args.checkpoint else Path()  # where a model card looks for the picture
    output = Path(args.output) if args.output else beside / 'attention.png'
    check_picture(output)
    device = setup_device(args)
    model = load_model(args)
    blocks = list(attention_modules(model))
    if not blocks:
        raise UserError(f'--model {args.model}: has no layer attention; networks named rla_* have')
    loader = create_validation_loader(args, place_model(args, model, device), device)
    names = class_names(model.num_classes, loader.dataset)
    classes = [find_class(text, names) for text in args.classes] if args.classes else None
    moments = measure_attention(model, loader, args, device, autocast=build_autocast(args, device))
    total = int(moments.count.sum())
    if not total:
        raise UserError(f'--split {args.split}: holds no images')
    if not utils.is_primary(args):
        return

    title = f'{args.model}, {total:,} image{"s" if total > 1 else ""}'
    print(format_table(moments, blocks, names))
    print(plot_attention(moments, blocks, output, title=title))
    print(plot_classes(moments, blocks, names, output.with_stem(f'{output.stem}-classes'), classes, title=title))
    print(write_csv(moments, blocks, names, output.with_suffix('.csv')))


def measure_attention(
        model: nn.Module,
        loader: Any,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable[[], Any],
) -> Moments:
    """Statistics of the layer attentions of each class, over the images of all processes; one batch at a time.

    Of RLA-vector the attention of an image is the mean over the channels.

    Args:
        model: RLA network with K classes and L blocks.
        loader: Validation loader of this process.
        args: Options as of `attention_parser`, after `setup_device`.
        device: Where the model is.
        autocast: Context manager of the forward pass.

    Raises:
        UserError: A label is not a class of the model.
    """
    num_classes = model.num_classes
    moments = Moments.of(torch.zeros(0, len(attention_modules(model))), torch.zeros(0, dtype=torch.long), num_classes)
    left = _images_of_process(loader.dataset, args)
    model.eval()
    progress = Progress('Attention', len(loader), args.log_interval, 0, utils.is_primary(args))
    with torch.inference_mode(), record_attention(model) as attention, progress:
        for images, target in loader:
            images, target = place_batch(images, target, args, device)
            with autocast():
                model(images)
            count = min(len(images), left)
            left -= count
            target = target[:count]
            if count and not 0 <= target.min() <= target.max() < num_classes:
                raise UserError(f'--data-dir: labels {target.min()} to {target.max()}, the model has classes 0 to '
                                f'{num_classes - 1}')
            batch = Moments.of(stack_attention(attention)[:count], target, num_classes)
            moments = Moments.merge([moments, batch])
            progress.update(len(images) * args.world_size)
    return moments.over_processes()


def _images_of_process(dataset: Any, args: argparse.Namespace) -> float:
    """How many images are this process's own: after them timm's sampler repeats some, for all to have as many."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return math.inf
    return len(range(args.rank, len(dataset), args.world_size))


def format_table(moments: Moments, blocks: Sequence[str], names: Sequence[str]) -> str:
    """Mean, standard deviation, and the classes with the highest and the lowest mean, of each block."""
    whole = moments.over_groups()
    mean, std = whole.mean[0].tolist(), whole.std[0].tolist()
    present = moments.count > 0
    highest = moments.mean.where(present[:, None], -torch.inf).max(0)
    lowest = moments.mean.where(present[:, None], torch.inf).min(0)
    rows: List[Tuple[str, ...]] = [('block', 'mean', 'std', 'highest class', 'lowest class')]
    for index, label in enumerate(block_labels(blocks)):
        ends = [f'{ends.values[index]:.4f} {short_name(names[ends.indices[index]])}' for ends in (highest, lowest)]
        rows.append((label, f'{mean[index]:.4f}', f'{std[index]:.4f}', *ends))
    return format_columns(rows, left=len(rows[0]))


def write_csv(moments: Moments, blocks: Sequence[str], names: Sequence[str], path: Path) -> Path:
    """Write a row for each class and block, those of all images first with an empty class; returns `path`."""
    groups = [('', 'all', moments.over_groups(), 0)]
    groups += [(k, name, moments, k) for k, name in enumerate(names) if moments.count[k] > 0]
    with blame(f'--output {path}', OSError), open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['class', 'name', 'block', 'images', 'mean', 'std'])
        for label, name, group, k in groups:
            for block, mean, std in zip(blocks, group.mean[k].tolist(), group.std[k].tolist()):
                writer.writerow([label, name, block, int(group.count[k]), mean, std])
    return path
