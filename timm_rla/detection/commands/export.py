"""`timm-rla detect export FILE`: write a trained detector as TorchScript or ONNX."""
import importlib.util
import warnings
from pathlib import Path
from typing import List

import torch

from ...common.errors import UserError, blame
from ...common.files import check_outputs, replacing
from ...common.options import OptionParser
from ..checkpoint import load_detector
from ..options import add_checkpoint_options

__all__ = ['main']


def export_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla detect export',
        description="Write a trained detector as TorchScript (.pt), for images of any size, or as ONNX (.onnx), as far "
                    "as torchvision's detectors have them.")
    add = parser.add_argument
    add('file', metavar='FILE', help='file to write, .pt or .onnx')
    add_checkpoint_options(add)
    parser.set_defaults(device='cpu')
    add('--input-size', nargs=2, type=int, default=[480, 640], metavar='N', help='height and width, of ONNX')
    return parser


def main(argv: List[str]) -> None:
    """Command line."""
    args = export_parser().parse_args(argv)
    path = Path(args.file)
    if path.suffix not in ('.pt', '.onnx'):
        raise UserError(f'{path}: its ending must be .pt or .onnx')
    if path.suffix == '.onnx' and importlib.util.find_spec('onnx') is None:
        raise UserError(f'{path}: the package onnx is missing; pip install onnx')
    if args.device != 'cpu':
        raise UserError(f'--device {args.device}: the file is made on the cpu, and runs where it is loaded to')
    check_outputs([('FILE', path)], [args.checkpoint])
    model = load_detector(args.checkpoint).model
    with blame(str(path), OSError, RuntimeError), replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if path.suffix == '.pt':
            torch.jit.script(model).save(str(temporary))
        else:
            torch.onnx.export(
                model, ([torch.rand(3, *args.input_size)],), str(temporary), opset_version=17, dynamo=False,
                input_names=['image'], output_names=['boxes', 'labels', 'scores'])
    print(f'{path.stat().st_size:>12,}  {path}')
