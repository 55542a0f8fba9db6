"""`timm-rla export CHECKPOINT DIR`: write a checkpoint as a folder that timm and transformers load."""
from pathlib import Path
from typing import Any, Callable, List, Optional

from ..common.options import OptionParser
from ..hub.export import export

__all__ = ['add_export_options', 'main']


def add_export_options(add: Callable[..., Any]) -> None:
    """Options that say what is exported, also for a push; `add` is a parser's `add_argument`."""
    add('--use-ema', action='store_true', help='take the EMA weights')
    add('--dataset-name', metavar='NAME', help='dataset that the network was trained on, if the checkpoint has no name')
    add('--license', metavar='ID', help='licence of the weights, such as apache-2.0')


def export_parser() -> OptionParser:
    parser = OptionParser(prog='timm-rla export', description='Write a checkpoint as a folder for the Hub.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run')
    parser.add_argument('directory', metavar='DIR', help='folder to write, new or empty')
    add_export_options(parser.add_argument)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = export_parser().parse_args(argv)
    folder = export(
        Path(args.checkpoint),
        Path(args.directory),
        use_ema=args.use_ema,
        dataset_name=args.dataset_name,
        license_id=args.license,
    )
    for path in sorted(folder.iterdir()):
        print(f'{path.stat().st_size:>12,}  {path}')
