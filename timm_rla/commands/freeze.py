"""`timm-rla freeze CHECKPOINT --data-dir DATA`: make timm's plain network of one that was trained with attention."""
import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from ..analysis.attention import attention_modules
from ..analysis.attention_statistics import measure_attention
from ..analysis.frozen import (
    block_values,
    check_freezes,
    compare,
    correct_predictions,
    freeze_at,
    spreads,
    what_attention_carries,
)
from ..common.checkpoint import read_checkpoint
from ..common.device import default_device
from ..common.errors import UserError, blame
from ..common.files import check_outputs, replacing, writing_text
from ..common.idle import warn_of_idle_options
from ..common.networks import Network, NetworkSpec, restore_network, trained_spec
from ..common.options import (
    OptionParser,
    add_data_options,
    add_precision_options,
    placement,
    validation_loader,
)
from ..common.table import format_columns
from ..common.trained import completed_epochs, training_options
from ..models.freeze import plain_arguments
from ..models.warm_start import plain_name

__all__ = ['main']


def freeze_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla freeze',
        description='Replace the layer attention of each block by its mean over a dataset. What is left is the plain '
                    'network, for ImageNet one of timm, which needs this package no more. Prints its accuracy beside '
                    'that of the network with attention.',
    )
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run of an RLA network')
    add('--output', metavar='FILE', help='checkpoint to write, frozen.pth.tar beside CHECKPOINT if not given')
    add('--use-ema', action='store_true', help='take the EMA weights')
    add('--study', action='store_true',
        help='also write a .json beside --output: spread of each attention, and accuracy with the means of each class, '
             'and with one block at a time held at its mean')
    add_data_options(add, 'train', 'split whose mean attention is taken')
    add('--val-split', metavar='NAME', default='validation', help='split whose accuracy is printed, none if empty')
    add('--val-num-samples', type=int, metavar='N', help='samples in that split, if it is iterable')
    add('--device', default=default_device(), help='device to use')
    add_precision_options(add)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = freeze_parser().parse_args(argv)
    source = f'CHECKPOINT {args.checkpoint}'
    content = read_checkpoint(args.checkpoint, 'CHECKPOINT')
    output = Path(args.output) if args.output else Path(args.checkpoint).with_name('frozen.pth.tar')
    if not output.name:
        raise UserError(f'--output {output}: is a folder')
    if output.suffix == '.safetensors':
        raise UserError(f'--output {output}: a checkpoint is written, as of training; .pth.tar is its ending')
    if args.study and not args.val_split:
        raise UserError("--study --val-split '': a study is of the accuracy on that split")
    study_output = output.with_name(output.name.removesuffix('.tar').removesuffix('.pth') + '.json')
    outputs = [('--output', output)] + [('--study', study_output)] * args.study
    for option, path in outputs:
        if os.path.lexists(path):
            raise UserError(f'{option} {path}: there is a file of that name')
    check_outputs(outputs, [args.checkpoint, args.class_map])
    spec = trained_spec(NetworkSpec(use_ema=args.use_ema), content, source)
    options = training_options(content, source)
    epoch = completed_epochs(content, source) - 1
    place = placement(args)
    if place.primary:
        warn_of_idle_options(args, freeze_parser())
    network = restore_network(spec, content, source, verbose=place.primary)
    if not attention_modules(network.model):
        raise UserError(f'{source}: {network.name} has no layer attention; networks rla_* have')
    with blame(source, ValueError):
        check_freezes(network.model, **spec.model_kwargs)
    model = place.place_model(copy.deepcopy(network.model))  # the weights themselves keep their type
    loader = validation_loader(args, network, place)
    evaluation = validation_loader(args, network, place, '--val-split') if args.val_split else None
    moments = measure_attention(model, loader, place, args.log_freq, channels=True)
    if not moments.count.sum():
        raise UserError(f'--split {args.split}: holds no images')
    whole = block_values(model, moments.over_groups().mean)
    with torch.inference_mode():  # as in the pass before: some readers of streams have kept tensors of it
        images, _ = next(iter(loader))
    with blame(source, ValueError):
        frozen_model = freeze_at(
            network.model, {name: mean[0] for name, mean in whole.items()}, images[:2], **spec.model_kwargs)
    plain = place.place_model(copy.deepcopy(frozen_model))
    study: Dict[str, Any] = dict(
        model=network.name, epoch=epoch, use_ema=args.use_ema, split=args.split,
        images=int(moments.count.sum()), blocks=spreads(moments, model))
    if evaluation is not None:
        attended, frozen = (correct_predictions(m, evaluation, place, label, args.log_freq)
                            for m, label in ((model, 'With attention'), (plain, 'With means')))
        result = compare(attended, frozen)
        study.update(val_split=args.val_split, val_images=len(attended), means=result._asdict())
        if args.study:
            study.update(what_attention_carries(model, moments, attended, evaluation, place, args.log_freq))
    if place.primary:
        saved = _checkpoint(frozen_model, epoch, options, network, spec)
        if args.study:
            with blame(f'--study {study_output}', OSError), writing_text(study_output) as f:
                f.write(json.dumps(study, indent=1) + '\n')
                f.flush()
                _save(saved, output)  # here, for both files to be there or none
        else:
            _save(saved, output)
        if evaluation is not None:
            print(f'Top-1 with attention {result.first:.2f} %, with its means {result}')
        columns = ('mean', 'std', 'class_std')
        print(format_columns([('block', 'mean', 'std', 'std of classes'), *(
            (name, *(f'{block[key]:.4f}' for key in columns)) for name, block in study['blocks'].items())], left=1))
        for _, path in reversed(outputs):
            print(path)


def _checkpoint(
        plain: torch.nn.Module,
        epoch: int,
        options: Dict[str, Any],
        network: Network,
        spec: NetworkSpec,
) -> Dict[str, Any]:
    """Checkpoint as timm's training writes it, of the plain network, which takes images as the run did."""
    name = plain_name(network.name)
    config = {key: network.data_config[key] for key in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
    changed = dict(
        model=name,
        model_kwargs=plain_arguments(name, spec.model_kwargs),
        frozen_from=dict(model=network.name, model_kwargs=spec.model_kwargs, use_ema=spec.use_ema),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
    )
    return dict(
        epoch=epoch, arch=name, args=argparse.Namespace(**{**options, **changed}),
        state_dict={key: value.cpu() for key, value in plain.state_dict().items()})


def _save(checkpoint: Dict[str, Any], output: Path) -> None:
    with blame(f'--output {output}', OSError, RuntimeError), replacing(output) as temporary:
        torch.save(checkpoint, temporary)
