"""`timm-rla list [PATTERN]`: the models of this package and its recipes."""
from typing import List, Optional, Tuple

import timm
import torch

from .. import models
from ..common.errors import UserError, closest
from ..common.options import OptionParser
from ..common.recipes import describe_recipe, recipes
from ..common.table import format_columns

__all__ = ['main']


def list_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla list',
        description='Models of this package: context length N, hidden units M, reduction r, parameters, and the '
                    'weights that --pretrained loads. All of these are warm starts: weights that timm hosts for the '
                    'network without layer attention, with neutral, untrained attention. Then the recipes.',
    )
    parser.add_argument('pattern', nargs='?', default='*', metavar='PATTERN',
                        help="models, such as 'rla_*50*'; a single one with the tags of all its weights")
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = list_parser().parse_args(argv)
    own = [name for name in timm.list_models() if name in vars(models.registry)]
    wanted = set(timm.list_models(args.pattern))
    found = [name for name in own if name in wanted]
    if not found:
        raise UserError(f'{args.pattern}: no such model; {closest(args.pattern, own)}')
    rows = [('model', 'N', 'M', 'r', 'parameters'), *map(_numbers, found)]
    weights = ['--pretrained', *(_weights(name, whole=len(found) == 1) for name in found)]
    for line, text in zip(format_columns(rows, left=1).splitlines(), weights):
        print(f'{line}  {text}')
    for command in ('train', 'detect train'):
        print(f'\nrecipes, for timm-rla {command} --config NAME')
        print(format_columns([(name, describe_recipe(path)) for name, path in recipes(command).items()], left=2))


def _numbers(name: str) -> Tuple[str, ...]:
    with torch.device('meta'):
        model = timm.create_model(name)
    numbers = ('-', '-', '-')
    if hasattr(model, 'lstm'):
        fc1 = model.layer1[0].attention.fc1
        numbers = (str(model.lstm.input_size), str(model.lstm.hidden_size), str(fc1.in_features // fc1.out_features))
    return (name, *numbers, f'{sum(p.numel() for p in model.parameters()):,}')


def _weights(name: str, whole: bool) -> str:
    tags = [weights.split('.', 1)[1] for weights in timm.list_pretrained(f'{name}.*')]
    if not tags:
        return '-'
    default = timm.get_pretrained_cfg(name).tag
    others = [tag for tag in tags if tag != default]
    more = f', {", ".join(others)}' if whole else f' and {len(others)} more'
    return f'warm start: {default}' + (more if others else '')
