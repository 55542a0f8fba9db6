"""`timm-rla detect train|eval|predict|export`: object detection with Faster R-CNN."""
import importlib
import sys
from typing import List, Optional

from ..common.errors import UserError, closest

__all__ = ['main']

ACTIONS = {
    'train': 'train a detector on images annotated in the format of COCO',
    'eval': 'the numbers of COCO for a trained detector',
    'predict': 'draw what a trained detector finds in images',
    'export': 'write a trained detector as TorchScript or ONNX',
}
USAGE = '\n'.join(['usage: timm-rla detect ACTION [OPTION ...]', '', 'Object detection with Faster R-CNN.', '',
                   'actions:', *(f'  {name:8} {text}' for name, text in ACTIONS.items()), '',
                   'timm-rla detect ACTION --help tells its options'])


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    action, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if action in ('-h', '--help'):
        print(USAGE)
        sys.exit(0)
    if action not in ACTIONS:
        raise UserError(f'{action}: no such action; {closest(action, ACTIONS)}; there are {", ".join(ACTIONS)}')
    try:
        module = importlib.import_module(f'timm_rla.detection.commands.{action}')
    except ModuleNotFoundError as e:
        raise UserError(f'{e.name} is missing; pip install "timm_rla[detection]" installs it') from e
    module.main(rest)
