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

from ..errors import blame
from .engine import validate
from .options import OptionParser
from .setup import build_autocast, setup_device
from .trained import (
    add_data_options,
    add_model_options,
    add_precision_options,
    create_validation_loader,
    load_model,
    place_model,
)

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
                    'meaning, except that without --model the model and its input are those of --checkpoint.',
        unsupported=UNSUPPORTED,
    )
    add = parser.add_argument
    add_data_options(add)
    add_model_options(add)
    add_precision_options(add)
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
    device = setup_device(args)
    model = load_model(args)
    param_count = sum(p.numel() for p in model.parameters())
    if args.reparam:
        model = utils.reparameterize_model(model)
    data_config = place_model(args, model, device)
    loader = create_validation_loader(args, data_config, device)
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
