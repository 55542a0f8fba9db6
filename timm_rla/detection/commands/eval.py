"""`timm-rla detect eval`: the numbers of COCO for a trained detector."""
import json
from pathlib import Path
from typing import Any, Dict, List

from ...common.errors import UserError, blame
from ...common.files import check_outputs, write_csv, writing_text
from ...common.options import OptionParser
from ...common.table import format_columns
from ..checkpoint import load_detector
from ..evaluation import NUMBERS, by_class_name
from ..options import add_checkpoint_options, add_data_options, find_data, read_data
from ..run import evaluate

__all__ = ['main']


def eval_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla detect eval', description='The twelve numbers of COCO and the average precision of each class.')
    add = parser.add_argument
    add_checkpoint_options(add)
    add_data_options(add, ('val',))
    add('--box-score-thresh', type=float, metavar='S', help='another one than in training')
    add('--json', metavar='FILE', help='write the numbers')
    add('--csv', metavar='FILE', help='write the numbers, a row for each')
    add('--results', metavar='FILE', help="write the detections as COCO's result files have them")
    return parser


def main(argv: List[str]) -> None:
    """Command line."""
    args = eval_parser().parse_args(argv)
    annotations = find_data(args, 'val')[0]
    outputs = {f'--{option}': getattr(args, option) for option in ('json', 'csv', 'results')}
    check_outputs([(option, Path(path)) for option, path in outputs.items() if path], [args.checkpoint, annotations])
    split = read_data(args, 'val')
    other = {} if args.box_score_thresh is None else dict(box_score_thresh=args.box_score_thresh)
    detector = load_detector(args.checkpoint, **other)
    if split.names != detector.names:
        raise UserError(f'--checkpoint {args.checkpoint}: its classes are {", ".join(detector.names)}, those of the '
                        f'data {", ".join(split.names)}')
    module = evaluate(detector, split, args.device, args.workers, args.skip_unreadable)
    if not module.trainer.is_global_zero:
        return
    numbers = by_class_name(module.numbers, split.names)
    if args.json:
        _write(Path(args.json), '--json', json.dumps(numbers, indent=1) + '\n')
    if args.results:
        _write(Path(args.results), '--results', json.dumps(module.results()))
    if args.csv:
        _write_csv(Path(args.csv), numbers)
    print(format_columns([
        *((text, f'{numbers[name]:.4f}') for name, text in NUMBERS.items()),
        *((f'AP @[.5, .95], {name}', f'{value:.4f}') for name, value in numbers['per_class'].items()),
    ], left=1))


def _write(path: Path, option: str, text: str) -> None:
    with blame(f'{option} {path}', OSError), writing_text(path) as f:
        f.write(text)


def _write_csv(path: Path, numbers: Dict[str, Any]) -> None:
    rows = [(name, '', numbers[name]) for name in NUMBERS]
    rows += [('map', name, value) for name, value in numbers['per_class'].items()]
    write_csv(path, ['number', 'class', 'value'], rows, '--csv')
