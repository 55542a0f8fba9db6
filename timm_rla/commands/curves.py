"""`timm-rla curves RUN...`: plot loss and error of training runs."""
from pathlib import Path
from typing import List, Optional

from ..analysis.curves import plot_curves
from ..common.options import OptionParser

__all__ = ['main']


def curves_parser() -> OptionParser:
    parser = OptionParser(prog='timm-rla curves', description='Plot loss and error of runs over each other.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or its summary.csv')
    parser.add_argument('--output', default='curves.png', metavar='FILE', help='picture; PNG, SVG or PDF by its ending')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = curves_parser().parse_args(argv)
    print(plot_curves([Path(run) for run in args.runs], Path(args.output)))
