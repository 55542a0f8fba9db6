"""A trained model and the images that it sees: options and set-up that validation and analysis share."""
import argparse
from typing import Any, Callable, Dict

import torch
import torch.nn as nn
from timm import utils
from timm.data import resolve_data_config
from timm.utils import ParseKwargs

from ..errors import UserError, blame
from .data import create_eval_loader
from .options import add_reader_options
from .setup import build_model, input_channels, load_weights, read_checkpoint

__all__ = [
    'add_data_options', 'add_model_options', 'add_precision_options', 'create_validation_loader', 'load_model',
    'place_model',
]


def add_data_options(add: Callable[..., Any]) -> None:
    """Options that say what is read and how; `add` is a parser's `add_argument`."""
    add('data', nargs='?', metavar='DIR', help='path to dataset (deprecated, use --data-dir)')
    add_reader_options(add)
    add('--split', metavar='NAME', default='validation', help='split')
    add('--num-samples', type=int, metavar='N', help='samples in an iterable split')
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--no-prefetcher', action='store_true', help='normalise on the CPU')
    add('--pin-mem', action='store_true', help='pin memory for the transfer to a GPU')


def add_model_options(add: Callable[..., Any]) -> None:
    """Options that name a trained model, its input and its device; `add` is a parser's `add_argument`."""
    add('-m', '--model', help='model name')
    add('--pretrained', action='store_true', help='use pretrained weights')
    add('--checkpoint', default='', metavar='FILE', help='weights')
    add('--use-ema', action='store_true', help='use the EMA weights of --checkpoint')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='model arguments')
    add('--num-classes', type=int, metavar='N', help='classes')
    add('--gp', metavar='POOL', help='global pooling')
    add('--img-size', type=int, metavar='N', help='image size')
    add('--in-chans', type=int, metavar='N', help='input channels')
    add('--input-size', nargs=3, type=int, metavar='N', help='input dimensions (channels, height, width)')
    add('--use-train-size', action='store_true', help='use the training size of the model, not that for testing')
    add('--crop-pct', type=float, metavar='PCT', help='centre crop, of the resized image')
    add('--crop-mode', help='squash, border or center')
    add('--crop-border-pixels', type=int, metavar='N', help='crop this border')
    add('--mean', type=float, nargs='+', help='mean pixel value per channel, in [0, 1]')
    add('--std', type=float, nargs='+', help='standard deviation per channel')
    add('--interpolation', default='', metavar='NAME', help='image resize interpolation')
    add('--device', default='cuda', help='device to use')


def add_precision_options(add: Callable[..., Any]) -> None:
    """Options that say in which layout and precision a model runs; `add` is a parser's `add_argument`."""
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='dtype of the model itself, without --amp')


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model that --model, --checkpoint and the like name, on the CPU; fills in what only the checkpoint tells.

    Raises:
        UserError: Unknown model, or a checkpoint that cannot be read or is of another model.
    """
    checkpoint = read_checkpoint(args.checkpoint, '--checkpoint') if args.checkpoint else {}
    if args.model is None:
        if 'args' not in checkpoint:
            raise UserError('--model: not given, and no --checkpoint of a training run that names it')
        _take_from_training(args, vars(checkpoint['args']))
    model = build_model(
        args,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        in_chans=input_channels(args),
        global_pool=args.gp,
    )
    args.num_classes = model.num_classes
    if checkpoint:
        load_weights(model, checkpoint, f'--checkpoint {args.checkpoint}', use_ema=args.use_ema)
    return model


def _take_from_training(args: argparse.Namespace, trained: Dict[str, Any]) -> None:
    """Model and input as a run was trained with, where the command line does not say otherwise."""
    args.model = trained['model']
    names = ['model_kwargs', 'num_classes', 'gp', 'in_chans', 'mean', 'std', 'crop_pct', 'interpolation']
    if args.img_size is None and args.input_size is None:  # either of them says it
        names += ['img_size', 'input_size']
    for name in names:
        if not getattr(args, name) and trained.get(name):
            setattr(args, name, trained[name])


def place_model(args: argparse.Namespace, model: nn.Module, device: torch.device) -> Dict[str, Any]:
    """Move a model to its device, in the layout and precision of the options; returns timm's data configuration."""
    with blame('model input'):
        data_config = resolve_data_config(
            vars(args), model=model, use_test_size=not args.use_train_size, verbose=utils.is_primary(args))
    model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return data_config


def create_validation_loader(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Any:
    """Loader of the images that the options name, for a model's data configuration.

    Raises:
        UserError: Missing or empty folder, more classes than the model has.
    """
    args.data_dir = args.data_dir or args.data
    args.log_interval = args.log_freq
    return create_eval_loader(
        args,
        data_config,
        device,
        args.split,
        args.batch_size,
        num_samples=args.num_samples,
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=args.crop_border_pixels,
    )
