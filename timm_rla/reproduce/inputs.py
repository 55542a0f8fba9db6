"""What is wrong with the input of runs, said once before the first of them, and not by each."""
import argparse
from typing import Dict, Optional, Sequence

from ..common.device import check_device
from ..common.errors import UserError
from ..common.options import parse
from .arguments import run_options
from .plan import Run
from .results import Results
from .tasks import DATASETS

__all__ = ['check_inputs']


def check_inputs(results: Results, runs: Sequence[Run], devices: Optional[Sequence[str]] = None) -> None:
    """Complain of devices that are not there, and of data that are not those that the table names.

    Args:
        results: Folder of the runs.
        runs: Those that are to be run here.
        devices: Devices that they are spread over, those of the options if None.

    Raises:
        UserError: No such device, no data, or data with another number of classes.
    """
    task = results.table.task
    first: Dict[str, Run] = {}  # of each data set
    for run in runs:
        first.setdefault(run.cell.dataset, run)
    for dataset, run in first.items():
        args = parse(task.parser(), run_options(task, run, results.length, results.options))
        for device in devices or [args.device]:
            check_device(device)
        found, expected = task.classes(args), getattr(args, 'num_classes', None) or DATASETS[dataset].num_classes
        if results.table.is_own and not hasattr(args, 'num_classes'):
            continue  # detectors: a user's table names the recipe, nothing says how many classes there are
        if found not in (None, expected):
            other = f', --num-classes {found} takes these images in its place' if hasattr(args, 'num_classes') else ''
            raise UserError(f'{_data(args)}: has {found} classes, {dataset} of this table {expected}; --datasets '
                            f'chooses among the data sets of the table{other}')


def _data(args: argparse.Namespace) -> str:
    given = {name: getattr(args, name, None) for name in ('dataset', 'data_dir', 'data')}
    return ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in given.items() if value)
