"""`timm-rla validate`: evaluate a model on a dataset."""
import argparse
import csv
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from timm import utils
from timm.data import resolve_data_config

from ..errors import UserError, blame
from .data import create_eval_loader
from .engine import validate
from .options import OptionParser, ParseKwargs, add_reader_options
from .setup import build_autocast, build_model, input_channels, load_weights, read_checkpoint, setup_device

__all__ = ['evaluate', 'main']

_logger = logging.getLogger(__name__)

UNSUPPORTED: Dict[str, Any] = {
    'num_gpu': 1, 'test_pool': False, 'tf_preprocessing': False, 'fuser': '', 'fast_norm': False, 'torchscript': False,
    'aot_autograd': False, 'real_labels': '', 'valid_labels': '', 'retry': False, 'seed': 42, 'metrics_avg': None,
    'naflex_loader': False, 'naflex_max_seq_len': 576,
}


def validate_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla validate',
        description="Evaluate a model. Options are those of timm's validate.py, with the same names, defaults and "
                    'meaning, except that --model is taken from --checkpoint if it is not given.',
        unsupported=UNSUPPORTED,
    )
    add = parser.add_argument
    add('data', nargs='?', metavar='DIR', help='path to dataset (deprecated, use --data-dir)')
    add_reader_options(add)
    add('--split', metavar='NAME', default='validation', help='split')
    add('--num-samples', type=int, metavar='N', help='samples in an iterable split')
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
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--no-prefetcher', action='store_true', help='normalise on the CPU')
    add('--pin-mem', action='store_true', help='pin memory for the transfer to a GPU')
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--device', default='cuda', help='device to use')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='dtype of the model itself, without --amp')
    add('--reparam', action='store_true', help='fold the model for inference')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--results-file', default='', metavar='FILE', help='write the result there')
    add('--results-format', default='csv', choices=('csv', 'json'), help='its format')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    utils.setup_default_logging()
    args = validate_parser().parse_args(argv)
    result = evaluate(args)
    if not utils.is_primary(args):
        return
    if args.results_file:
        write_result(result, Path(args.results_file), args.results_format)
    print(f'--result\n{json.dumps(result, indent=4)}')


def write_result(result: Dict[str, Any], path: Path, fmt: str) -> None:
    """Write one result as CSV (header and row) or JSON."""
    with blame(f'--results-file {path}', OSError), open(path, 'w', newline='') as f:
        if fmt == 'json':
            json.dump(result, f, indent=4)
        else:
            writer = csv.DictWriter(f, fieldnames=result.keys())
            writer.writeheader()
            writer.writerow(result)


def evaluate(args: argparse.Namespace) -> 'OrderedDict[str, Any]':
    """Evaluate as the options say.

    Returns:
        Row in the columns of timm's validate.py: accuracy and error in percent, parameters in millions.

    Raises:
        UserError: Bad input.
    """
    args.data_dir = args.data_dir or args.data
    args.log_interval = args.log_freq
    checkpoint = read_checkpoint(args.checkpoint, '--checkpoint') if args.checkpoint else {}
    trained = vars(checkpoint['args']) if 'args' in checkpoint else {}
    if args.model is None:
        args.model = trained.get('model')
        args.model_kwargs = args.model_kwargs or trained.get('model_kwargs') or {}
        if args.num_classes is None:
            args.num_classes = trained.get('num_classes')
        if args.model is None:
            raise UserError('--model: not given, and no --checkpoint of a training run that names it')
    device = setup_device(args)

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
    param_count = sum(p.numel() for p in model.parameters())
    if args.reparam:
        model = utils.reparameterize_model(model)
    with blame('model input'):
        data_config = resolve_data_config(
            vars(args), model=model, use_test_size=not args.use_train_size, verbose=utils.is_primary(args))
    model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    loader = create_eval_loader(
        args,
        data_config,
        device,
        args.split,
        args.batch_size,
        num_samples=args.num_samples,
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=args.crop_border_pixels,
    )
    if args.torchcompile:
        with blame(f'--torchcompile {args.torchcompile}'):
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    metrics = validate(model, loader, args, device, autocast=build_autocast(args, device))
    return OrderedDict(
        model=args.model,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )
