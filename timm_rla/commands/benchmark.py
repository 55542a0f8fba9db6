"""`timm-rla benchmark`: measure models beside each other, or one of the suites behind the documentation's tables."""
import argparse
from pathlib import Path
from typing import List, Optional

import torch

from ..benchmark.measure import measure
from ..benchmark.plan import check_devices, not_measured, plan_models, plan_suite
from ..benchmark.precision import PRECISIONS
from ..benchmark.results import check_output, format_rows, update
from ..benchmark.suites import SUITES
from ..benchmark.variants import SUFFIXES
from ..common.device import default_device
from ..common.errors import UserError
from ..common.idle import warn_of_idle_options
from ..common.options import OptionParser

__all__ = ['benchmark_parser', 'main']

# options that go together with a suite, too
OF_ANY = ('help', 'suite', 'only', 'missing', 'rounds', 'seconds', 'starts', 'threads', 'output')


def benchmark_parser() -> OptionParser:
    """Options of the command."""
    forms = '; '.join(f'MODEL+{name}: {suffix.help}' for name, suffix in SUFFIXES.items())
    parser = OptionParser(
        prog='timm-rla benchmark',
        description='Measure what models cost in relation to the first one. They run in turns, round by round, each in '
                    'a process to itself; ratios are taken within a round. Options that timm has, too, are those of '
                    'its benchmark.py.',
        epilog=f'MODEL+KEY=VALUE is a model with an argument. {forms}.',
    )
    add = parser.add_argument_group('What').add_argument
    add('-m', '--model', '--models', dest='models', nargs='+', metavar='MODEL',
        default=['resnet50', 'seresnet50', 'rla_resnet50'], help='models')
    add('--baseline', metavar='MODEL', help='the one that ratios refer to, the first if not given')
    add('--modes', nargs='+', choices=('train', 'infer'), default=['train', 'infer'], help='kinds of steps')
    add('-b', '--batch-size', type=int, nargs='+', metavar='N', help='batch sizes, 256 if not given')
    add('--img-size', type=int, metavar='N', help='image size, that of the first model if not given')
    add('--device', default=default_device(), help='cpu, cuda or cuda:N')
    add('--precision', default='float32', choices=tuple(PRECISIONS), help='numeric precision')
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--torchcompile', nargs='?', const='inductor', default='', metavar='BACKEND', help='compile the models')
    add('--torchcompile-mode', default='', metavar='MODE', help='mode of torch.compile')
    add('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='arguments of every model')

    add = parser.add_argument_group('Suites').add_argument
    add('--suite', choices=tuple(SUITES), help='settings of a table in the documentation, instead of those above')
    add('--only', nargs='+', default=[], metavar='WORD', help='settings of it whose name has one of these in it')
    add('--missing', action='store_true', help='leave out settings that --output has for this machine already')

    add = parser.add_argument_group('How').add_argument
    add('--rounds', type=int, default=25, metavar='N', help='rounds')
    add('--seconds', type=float, default=0.2, metavar='S', help='time of each model in a round, at least one step')
    add('--starts', type=int, default=3, metavar='N',
        help='how often the processes are started, since where its memory lies makes one faster than another; the '
             'rounds are shared out among the starts')
    add('--threads', type=int, metavar='N', help="threads on the CPU, PyTorch's choice if not given")
    add('--output', metavar='FILE', help='table to write to, results/benchmark-SUITE.csv for a suite')
    return parser


def _check_combination(args: argparse.Namespace, parser: OptionParser) -> None:
    """Complain of options that do not go together with a suite, or not without one."""
    for action in parser._actions:
        if args.suite and action.dest not in OF_ANY and getattr(args, action.dest) != action.default:
            raise UserError(f'{action.option_strings[-1]}: not together with --suite, which says that by itself')
    for option in ('only', 'missing'):
        if getattr(args, option) and not args.suite:
            raise UserError(f'--{option}: only together with --suite')


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    parser = benchmark_parser()
    args = parser.parse_args(argv)
    _check_combination(args, parser)
    warn_of_idle_options(args, parser)
    plan = plan_suite(args.suite, args.only) if args.suite else plan_models(
        args.models,
        args.modes,
        args.batch_size or [256],
        args.device,
        args.baseline,
        args.img_size,
        args.model_kwargs,
        precision=args.precision,
        channels_last=args.channels_last,
        torchcompile=args.torchcompile,
        torchcompile_mode=args.torchcompile_mode,
    )
    check_devices(plan)
    output = Path(args.output or f'results/benchmark-{args.suite}.csv') if args.output or args.suite else None
    if output is not None:
        check_output(output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.missing:
        plan = not_measured(plan, output)

    for index, setting in enumerate(plan, start=1):
        rows = measure(setting, args.rounds, args.seconds, args.starts, label=f'[{index}/{len(plan)}] {setting.name}')
        if output is not None:
            update(output, rows)  # after each setting, so that an interrupted run keeps what it has
        print(f'\n{setting.name}, {setting.precision}, {rows[0]["hardware"]}\n{format_rows(rows)}\n', flush=True)
    if output is not None:
        print(output)
