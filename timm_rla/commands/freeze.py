"""`timm-rla freeze CHECKPOINT --data-dir DATA`: make timm's plain network of one that was trained with attention."""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from timm.utils import setup_default_logging

from ..analysis.attention import attention_modules
from ..analysis.frozen import compare, correct_predictions, mean_attention
from ..common.checkpoint import read_checkpoint, training_options
from ..common.errors import UserError, blame
from ..common.files import replacing
from ..common.networks import NetworkSpec, load_network
from ..common.options import (
    OptionParser,
    add_precision_options,
    add_reader_options,
    placement,
    validation_loader,
)
from ..common.table import format_columns
from ..models.freeze import freeze_attention, plain_arguments, plain_name

__all__ = ['main']


def freeze_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla freeze',
        description='Replace the layer attention of each block by its mean over a dataset. What is left is the plain '
                    'network of timm, which needs this package no more. Prints its accuracy beside that of the network '
                    'with attention.',
    )
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run of an RLA network')
    add('--output', metavar='FILE', help='checkpoint to write, frozen.pth.tar beside CHECKPOINT if not given')
    add('--use-ema', action='store_true', help='take the EMA weights')
    add_reader_options(add)
    add('--split', metavar='NAME', default='train', help='split whose mean attention is taken')
    add('--val-split', metavar='NAME', default='validation', help='split whose accuracy is printed, none if empty')
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--device', default='cuda', help='device to use')
    add_precision_options(add)
    parser.set_defaults(data=None, num_samples=None, no_prefetcher=False, pin_mem=False, crop_border_pixels=None)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    setup_default_logging()
    args = freeze_parser().parse_args(argv)
    output = Path(args.output) if args.output else Path(args.checkpoint).with_name('frozen.pth.tar')
    if output.exists():
        raise UserError(f'--output {output}: there is a file of that name')
    content = read_checkpoint(args.checkpoint, 'CHECKPOINT')
    options = training_options(content)
    if not options:
        raise UserError(f'CHECKPOINT {args.checkpoint}: not of a training run; it does not say which model it is')
    place = placement(args)
    network = load_network(NetworkSpec(checkpoint=args.checkpoint, use_ema=args.use_ema), verbose=place.primary)
    if not attention_modules(network.model):
        raise UserError(f'CHECKPOINT {args.checkpoint}: {network.name} has no layer attention; networks rla_* have')
    model = place.place_model(network.model)
    means = mean_attention(model, validation_loader(args, network, place), place, args.log_freq)
    with blame(f'CHECKPOINT {args.checkpoint}', ValueError):
        plain = place.place_model(freeze_attention(model, means, **(options.get('model_kwargs') or {})))
    if args.val_split:
        loader = validation_loader(args, network, place, args.val_split)
        result = compare(*(correct_predictions(m, loader, place, label, args.log_freq)
                           for m, label in ((model, 'With attention'), (plain, 'With means'))))
        lower, upper = result.interval or (float('nan'),) * 2
        print(f'Top-1 with attention {result.first:.2f} %, with its means {result.second:.2f} %: '
              f'{result.difference:+.2f} points ({lower:+.2f} to {upper:+.2f})')
    if place.primary:
        print(format_columns([(name, f'{a.mean():.4f}') for name, a in means.items()], left=1))
        _save(plain, content, options, output)
        print(output)


def _save(plain: torch.nn.Module, content: Dict[str, Any], options: Dict[str, Any], output: Path) -> None:
    """Write a checkpoint as timm's training does, of the plain network."""
    kwargs = plain_arguments(plain_name(options['model']), options.get('model_kwargs') or {})
    args = argparse.Namespace(**{**options, 'model': plain_name(options['model']), 'model_kwargs': kwargs})
    with blame(f'--output {output}', OSError), replacing(output) as temporary:
        torch.save(dict(
            epoch=content.get('epoch', 0), arch=args.model, args=args,
            state_dict={key: value.cpu() for key, value in plain.state_dict().items()}), temporary)
