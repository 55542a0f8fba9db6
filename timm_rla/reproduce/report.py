"""The report of a table: errors beside the paper's, and what each network gains over the plain one, with intervals."""
import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch

from ..common.extras import import_extra
from ..common.files import replacing
from ..common.summary import read_summary
from .plan import Cell, Run, Table
from .runs import Results, recipe_epochs

__all__ = ['Row', 'format_interval', 'paired_interval', 'report_rows', 'title', 'write_csv', 'write_markdown']

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """A cell and what its runs say. Errors are top-1 errors in percent, after the last epoch."""
    cell: Cell
    params: float  # in millions, as the network has
    errors: Dict[int, float]  # by seed, of finished runs
    planned: int  # seeds
    difference: Optional[float]  # mean over the seeds that both have, from the plain network
    interval: Optional[Tuple[float, float]]  # of the difference; None with less than two common seeds
    pairs: int  # common seeds

    @property
    def mean(self) -> Optional[float]:
        return statistics.mean(self.errors.values()) if self.errors else None

    @property
    def std(self) -> Optional[float]:
        """Sample standard deviation over the seeds; None with less than two."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else None


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Optional[Tuple[float, float]]:
    """t-interval of the mean of paired differences; None with less than two."""
    count = len(differences)
    if count < 2:
        return None
    quantile = import_extra('scipy.stats', 'analysis').t.ppf((1 + confidence) / 2, count - 1)
    mean, half = statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def _errors(results: Results, cell: Cell, seeds: Sequence[int]) -> Dict[int, float]:
    errors = {}
    for seed in seeds:
        run = Run(cell, seed)
        rows = read_summary(results.path / run.name)
        if rows and rows[-1]['epoch'] + 1 >= results.epochs_of(run):
            errors[seed] = 100 - rows[-1]['eval_top1']  # never the best epoch
    return errors


def _params(cell: Cell, num_classes: int) -> float:
    with torch.device('meta'):
        model = timm.create_model(cell.model, num_classes=num_classes, **cell.model_kwargs)
    return sum(p.numel() for p in model.parameters()) / 1e6


CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000}


def report_rows(results: Results, seeds: Sequence[int]) -> List[Row]:
    """A row for each cell, in the order of the table.

    Args:
        results: Folder of the runs.
        seeds: Seeds to look for.
    """
    table: Table = results.table
    errors = {cell: _errors(results, cell, seeds) for cell in table.cells}
    rows = []
    for cell in table.cells:
        plain = errors[table.plain(cell)]
        common = sorted(set(errors[cell]) & set(plain)) if cell.key != 'plain' else []
        differences = [errors[cell][seed] - plain[seed] for seed in common]
        rows.append(Row(
            cell,
            _params(cell, CLASSES[cell.dataset]),
            errors[cell],
            len(seeds),
            statistics.mean(differences) if differences else None,
            paired_interval(differences),
            len(common),
        ))
    return rows


def format_interval(interval: Optional[Tuple[float, float]]) -> str:
    """In words, also if there is none."""
    return 'needs two seeds' if interval is None else f'{interval[0]:+.2f} to {interval[1]:+.2f}'


def _number(value: Optional[float], digits: int = 2, sign: bool = False) -> str:
    return '' if value is None else f'{value:{"+" if sign else ""}.{digits}f}'


def title(results: Results, data: str) -> str:
    """Title of table and pictures: says what was shortened and on which data.

    Args:
        results: Folder of the runs.
        data: What the user says of the data, such as 'CIFAR-10 re-encoded as JPEG'.
    """
    parts = [results.table.title]
    if results.epochs is not None:
        usual = sorted({recipe_epochs(cell.dataset) for cell in results.table.cells})
        parts.append(f'{results.epochs} epochs instead of {" and ".join(map(str, usual))}')
    if data:
        parts.append(data)
    return ', '.join(parts)


def write_markdown(path: Path, heading: str, rows: Sequence[Row], more: Sequence[str] = ()) -> Path:
    """Write the table as Markdown, and more lines below it; returns `path`."""
    lines = [
        f'# {heading}',
        '',
        'Top-1 error in percent after the last epoch: mean and standard deviation over seeds. Difference: from the '
        'plain network, paired by seed, with its 95 % t-interval; below 0 is better than plain.',
        '',
        '| data set | network | paper | here | n | difference | interval | parameters (M) | paper (M) |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        here = 'missing' if row.mean is None else f'{row.mean:.2f}'
        if row.std is not None:
            here += f' ± {row.std:.2f}'
        interval = '' if row.cell.key == 'plain' else format_interval(row.interval)
        cells = [
            row.cell.dataset, row.cell.name, _number(row.cell.paper_error), here, f'{len(row.errors)} of {row.planned}',
            _number(row.difference, sign=True), interval, _number(row.params, 3), _number(row.cell.paper_params, 3),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    with replacing(path) as temporary:
        temporary.write_text('\n'.join([*lines, *more]) + '\n')
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write a row for each cell and seed, and the figures of each cell; returns `path`."""
    columns = ['dataset', 'depth', 'cell', 'model', 'seed', 'error', 'mean', 'std', 'n', 'difference', 'lower', 'upper',
               'pairs', 'paper_error', 'params', 'paper_params']
    with replacing(path) as temporary, open(temporary, 'w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        for row in rows:
            common: Dict[str, Any] = dict(
                dataset=row.cell.dataset, depth=row.cell.depth, cell=row.cell.key, model=row.cell.model, mean=row.mean,
                std=row.std, n=len(row.errors), difference=row.difference, pairs=row.pairs,
                paper_error=row.cell.paper_error, params=round(row.params, 6), paper_params=row.cell.paper_params)
            if row.interval is not None:
                common.update(lower=row.interval[0], upper=row.interval[1])
            for seed, error in row.errors.items():
                writer.writerow(dict(common, seed=seed, error=round(error, 4)))
            if not row.errors:
                writer.writerow(common)
    return path
