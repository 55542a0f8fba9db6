"""`timm-rla benchmark`: measure models beside each other, or one of the suites behind the tables of README.md."""
import argparse
from pathlib import Path
from typing import List, Optional

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.utils import setup_default_logging

from ..environment import describe_environment
from ..errors import UserError, blame, closest
from ..train.options import OptionParser
from .measure import measure
from .results import check_output, find, format_rows, read, update
from .suites import SUITES, Setting
from .workload import FOLDED, PRECISIONS

__all__ = ['benchmark_parser', 'main', 'settings']

# options that go together with a suite, too
OF_ANY = ('help', 'suite', 'only', 'missing', 'rounds', 'seconds', 'starts', 'threads', 'output')


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'{text} is not above 0')
        return value

    parse.__name__ = kind.__name__  # argparse names it in messages
    return parse


def benchmark_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla benchmark',
        description='Measure what models cost in relation to the first one. They run in turns, round by round, each in '
                    'a process to itself; ratios are taken within a round. Options that timm has, too, are those of '
                    'its benchmark.py.',
        epilog=f'MODEL+KEY=VALUE is a model with an argument, MODEL+{FOLDED} a model folded for inference by '
               "timm's reparameterize_model.",
    )
    count, seconds = _positive(int), _positive(float)
    add = parser.add_argument_group('What').add_argument
    add('-m', '--model', '--models', dest='models', nargs='+', metavar='MODEL',
        default=['resnet50', 'seresnet50', 'rla_resnet50'], help='models')
    add('--baseline', metavar='MODEL', help='the one that ratios refer to, the first if not given')
    add('--modes', nargs='+', choices=('train', 'infer'), default=['train', 'infer'], help='kinds of steps')
    add('-b', '--batch-size', type=count, nargs='+', default=[256], metavar='N', help='batch sizes')
    add('--img-size', type=count, metavar='N', help='image size, that of the first model if not given')
    add('--device', default='cuda', help='cpu, cuda or cuda:N')
    add('--precision', default='float32', choices=tuple(PRECISIONS), help='numeric precision')
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--torchcompile', nargs='?', const='inductor', default='', metavar='BACKEND', help='compile the models')
    add('--torchcompile-mode', default='', metavar='MODE', help='mode of torch.compile')
    add('--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='arguments of every model')

    add = parser.add_argument_group('Suites').add_argument
    add('--suite', choices=tuple(SUITES), help='settings of a table in README.md, instead of those above')
    add('--only', nargs='+', metavar='WORD', help='settings of it whose name has one of these in it')
    add('--missing', action='store_true', help='leave out settings that --output has for this machine already')

    add = parser.add_argument_group('How').add_argument
    add('--rounds', type=count, default=25, metavar='N', help='rounds')
    add('--seconds', type=seconds, default=0.2, metavar='S', help='time of each model in a round, at least one step')
    add('--starts', type=count, default=3, metavar='N',
        help='how often the processes are started, since where its memory lies makes one faster than another; the '
             'rounds are shared out among the starts')
    add('--threads', type=count, metavar='N', help="threads on the CPU, PyTorch's choice if not given")
    add('--output', metavar='FILE', help='table to write to, results/benchmark-SUITE.csv for a suite')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    parser = benchmark_parser()
    args = parser.parse_args(argv)
    setup_default_logging()
    plan = settings(args, parser)
    output = Path(args.output or f'results/benchmark-{args.suite}.csv') if args.output or args.suite else None
    if output is not None:
        check_output(output)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.missing:
        plan = [setting for setting in plan if not _is_measured(setting, output)]

    for index, setting in enumerate(plan, start=1):
        rows = measure(setting, args.rounds, args.seconds, args.starts, label=f'[{index}/{len(plan)}] {setting.name}')
        print(f'\n{setting.name}, {setting.precision}, {rows[0]["hardware"]}\n{format_rows(rows)}\n', flush=True)
        if output is not None:
            update(output, rows)  # after each setting, so that an interrupted run keeps what it has
    if output is not None:
        print(output)


def settings(args: argparse.Namespace, parser: OptionParser) -> List[Setting]:
    """What the options ask for.

    Raises:
        UserError: They do not go together, or this machine cannot do it.
    """
    plan = _suite_settings(args, parser) if args.suite else _own_settings(args)
    for device in {setting.device for setting in plan}:
        _check_device(device)
    return plan


def _suite_settings(args: argparse.Namespace, parser: OptionParser) -> List[Setting]:
    for action in parser._actions:
        if action.dest not in OF_ANY and getattr(args, action.dest) != action.default:
            raise UserError(f'{action.option_strings[-1]}: not together with --suite, which says that by itself')
    suite = SUITES[args.suite]
    for word in args.only or []:
        if not any(word in setting.name for setting in suite):
            raise UserError(f'--only {word}: not in {", ".join(setting.name for setting in suite)}')
    return [setting for setting in suite if not args.only or any(word in setting.name for word in args.only)]


def _own_settings(args: argparse.Namespace) -> List[Setting]:
    for option in ('only', 'missing'):
        if getattr(args, option):
            raise UserError(f'--{option}: only together with --suite')
    for name in args.models:
        base = name.split('+')[0]
        if not timm.is_model(base):
            raise UserError(f'--model {name}: no such model; {closest(base, timm.list_models())}')
        if args.models.count(name) > 1:
            raise UserError(f'--model {name}: given twice')
        if 'train' in args.modes and FOLDED in name.split('+')[1:]:
            raise UserError(f'--model {name}: a folded model cannot be trained; --modes infer')
    baseline = args.baseline or args.models[0]
    if baseline not in args.models:
        raise UserError(f'--baseline {baseline}: not among the models {", ".join(args.models)}')
    names = [baseline, *(name for name in args.models if name != baseline)]
    return [
        Setting(
            models=tuple('+'.join([name, *args.model_kwargs]) for name in names),
            mode=mode,
            batch_size=batch_size,
            img_size=args.img_size or get_pretrained_cfg(baseline.split('+')[0]).input_size[-1],
            device=args.device,
            precision=args.precision,
            channels_last=args.channels_last,
            torchcompile=args.torchcompile,
            torchcompile_mode=args.torchcompile_mode,
        )
        for mode in dict.fromkeys(args.modes) for batch_size in dict.fromkeys(args.batch_size)
    ]


def _check_device(name: str) -> None:
    with blame(f'--device {name}'):
        device = torch.device(name)
    if device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device {name}: neither cpu nor cuda')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices on this machine')


def _is_measured(setting: Setting, output: Path) -> bool:
    hardware = describe_environment(setting.device)['hardware']
    return len(find([row for row in read(output) if row['hardware'] == hardware], setting)) == len(setting.models)
