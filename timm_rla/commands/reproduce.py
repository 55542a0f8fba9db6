"""`timm-rla reproduce TABLE`: train what a table of the paper needs, and report it."""
import logging
import os
import tempfile
from pathlib import Path
from typing import List, Optional

from ..common.errors import UserError, blame
from ..common.extras import import_extra
from ..common.files import check_writable
from ..common.image_folder import shorten
from ..common.options import OptionParser
from ..reproduce.content import TABLES
from ..reproduce.inputs import check_inputs
from ..reproduce.plan import load_table, plan_runs, runs_there
from ..reproduce.results import Results
from ..reproduce.runs import run_all, shell_commands

__all__ = ['main']

_logger = logging.getLogger(__name__)

CURVES, DIFFERENCES, ATTENTIONS = PICTURES = ('curves.png', 'differences.png', 'attentions.png')  # of a report


def reproduce_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla reproduce',
        description='Train what a table of the paper needs, run by run, and report it beside the paper. Finished runs '
                    'are skipped, interrupted ones go on. Other options are those of timm-rla train, or of timm-rla '
                    'detect train for a table of detectors, for every run; {seed}, {cell} and {depth} in them stand '
                    'for its seed, its network, as --only names it, and the depth.',
    )
    add = parser.add_argument
    add('table', metavar='TABLE', help=f'{", ".join(TABLES)}, or a YAML file with a table of your own')
    add('--output', metavar='DIR', help='folder of the runs, output/TABLE if not given')
    add('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N',
        help='seeds of each network; reports have all that are there')
    add('--epochs', type=int, metavar='N', help='epochs, those of the recipe if not given; its steps follow')
    add('--iterations', type=int, metavar='N', help='the same for tables of detectors')
    add('--depth', nargs='+', type=int, metavar='N', help='other depths than those of the paper')
    add('--datasets', nargs='+', metavar='NAME', help='some of its data sets')
    add('--only', nargs='+', metavar='CELL', help='some of its networks; the plain one is always there')
    add('--jobs', type=int, metavar='K', help='runs at a time, one for each device if not given')
    add('--devices', nargs='+', metavar='DEVICE', help='devices that the runs are spread over')
    add('--print', action='store_true',
        help="print a shell command for each missing run, and run nothing; for GNU parallel, or xargs -d '\\n' -n 1 sh "
             '-c')
    add('--report', action='store_true', help='write the report of the runs that are there, and run nothing')
    add('--data-note', default='', metavar='TEXT', help='what the titles of the report say of the data')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args, options = reproduce_parser().parse_known_args(argv)
    for name in ('print', 'report'):
        for other in ('report', 'jobs', 'devices'):
            if getattr(args, name) and name != other and getattr(args, other):
                raise UserError(f'--{name} --{other}: --{name} runs nothing; one of the two')
    if not args.data_note.isprintable():
        raise UserError(f'--data-note {args.data_note!r}: signs that cannot be printed, such as line breaks, cannot be '
                        'in it')
    seeds = list(dict.fromkeys(args.seeds))
    output = Path(args.output or f'output/{Path(args.table).stem}')
    table = load_table(args.table, args.depth, args.datasets, args.only, {run['key'] for run in runs_there(output)})
    task = table.task
    for unit in {'epoch', 'iteration'} - {task.unit}:
        if getattr(args, f'{unit}s') is not None:
            raise UserError(f'--{unit}s: the length of runs of {args.table} is --{task.unit}s')
    length = getattr(args, f'{task.unit}s')
    runs = plan_runs(table, seeds, args.only)
    results = Results(output, table, length, options, args.data_note)
    if args.print:
        results.record()  # they may come to run there without this command
        for line in shell_commands(results, runs):
            print(line)
        return
    for module in ('matplotlib', 'scipy'):  # the report, which comes after the runs, needs them
        import_extra(module, 'analysis')
    failed = []
    if not args.report:
        check_inputs(results, results.missing(runs), args.devices)
        with results.locked():
            failed = run_all(results, runs, args.jobs or len(args.devices or ['']), args.devices or [])
    elif not results.recorded:
        raise UserError(f'--report --output {results.path}: nothing has been run or printed there for this table with '
                        'these options')
    elif args.data_note:
        results.write_settings()
    for path in report(results, seeds):
        print(path)
    if failed:
        raise UserError(f'{len(failed)} runs failed, first {failed[0].name}; {results.path / failed[0].name}.log')


def report(results: Results, asked: List[int]) -> List[Path]:
    """Write table and pictures beside the runs, all of them or none; returns the files.

    Args:
        results: Folder of the runs.
        asked: Seeds that are to be there; those that are there besides come in, too.
    """
    from ..reproduce.plots import plot_attentions, plot_curves, plot_differences
    from ..reproduce.report import facts, report_rows, title, write_figures, write_markdown
    from ..reproduce.studies import markdown_lines, read_studies

    seeds = results.seeds(asked)
    rows, others = report_rows(results, seeds), results.others(seeds)
    if others:
        _logger.warning(f'{results.path}: not in this report: {shorten(others)}')
    task, heading = results.table.task, title(results)
    studied = read_studies(results, rows)
    with blame(f'--output {results.path}', OSError), \
            tempfile.TemporaryDirectory(prefix='.report-', dir=results.path) as temporary:
        folder = Path(temporary)
        written = [
            write_markdown(
                folder / 'report.md', heading, rows, task.unit, facts(results, others), markdown_lines(studied)),
            write_figures(folder / 'report.csv', rows),
        ]
        if any(row.values for row in rows):
            written += [
                plot_curves(results, rows, heading, folder / CURVES),
                plot_differences(rows, task.measure, heading, folder / DIFFERENCES),
            ]
        if studied:
            written.append(plot_attentions(studied, heading, folder / ATTENTIONS))
        files = [results.path / path.name for path in written]
        for file in files:
            check_writable(file, '--output')
        for path, file in zip(written, files):
            os.replace(path, file)
        for name in set(PICTURES) - {path.name for path in written}:
            (results.path / name).unlink(missing_ok=True)  # of another report
    return files
