"""The report of a table: figures beside the paper's, and what each network gains over the plain one, with intervals."""
import logging
import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..common.extras import import_extra
from ..common.files import write_csv, writing_text
from ..common.summary import SUMMARY, read_summary
from .arguments import recipe_length
from .plan import Cell, Run
from .results import Results
from .tasks import Metric

__all__ = [
    'Row', 'facts', 'format_interval', 'paired_interval', 'report_rows', 'title', 'write_figures', 'write_markdown',
]

CONFIDENCE = 0.95
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A cell and what its runs say of a metric, in percent, at their end."""
    cell: Cell
    metric: Metric
    params: float  # in millions, as the network has
    values: Dict[int, float]  # by seed, of finished runs
    planned: int  # seeds
    difference: Optional[float]  # mean over the seeds that both have, from the plain network
    interval: Optional[Tuple[float, float]]  # of the difference; None with less than two common seeds
    pairs: int  # common seeds

    @property
    def paper(self) -> Optional[float]:
        return self.cell.paper.get(self.metric.key)

    @property
    def mean(self) -> Optional[float]:
        return statistics.mean(self.values.values()) if self.values else None

    @property
    def std(self) -> Optional[float]:
        """Sample standard deviation over the seeds; None with less than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Optional[Tuple[float, float]]:
    """t-interval of the mean of paired differences; None with less than two."""
    count = len(differences)
    if count < 2:
        return None
    quantile = import_extra('scipy.stats', 'analysis').t.ppf((1 + confidence) / 2, count - 1)
    mean, half = statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def _last_rows(results: Results, cell: Cell, seeds: Sequence[int]) -> Dict[int, Dict[str, float]]:
    """The last row of each finished run: never the best one. A run whose last row is damaged is left out, and said."""
    task = results.table.task
    found = {}
    for seed in seeds:
        run = Run(cell, seed)
        if not results.is_finished(run):
            continue
        rows = read_summary(results.path / run.name)
        if task.is_whole(rows[-1]):
            found[seed] = rows[-1]
        damaged = sum(not task.is_whole(row) for row in rows)
        if damaged:
            _logger.warning(
                f'{results.path / run.name / SUMMARY}: {damaged} of {len(rows)} rows without a training '
                f'loss and {" and ".join(metric.name for metric in task.metrics)} from 0 to 100 %; '
                + ('not in the curves' if seed in found else 'the last row is one, the run is left out'))
    return found


def report_rows(results: Results, seeds: Sequence[int]) -> List[Row]:
    """A row for each metric and cell, in the order of the table.

    Args:
        results: Folder of the runs.
        seeds: Seeds to look for.
    """
    table = results.table
    last = {cell: _last_rows(results, cell, seeds) for cell in table.cells}
    rows = []
    for metric in table.task.metrics:
        values = {cell: {seed: metric.value(row) for seed, row in last[cell].items()} for cell in table.cells}
        for cell in table.cells:
            plain = values[table.plain(cell)]
            common = sorted(set(values[cell]) & set(plain)) if cell.key != 'plain' else []
            differences = [values[cell][seed] - plain[seed] for seed in common]
            rows.append(Row(
                cell,
                metric,
                results.parameters[cell] / 1e6,
                values[cell],
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


def title(results: Results) -> str:
    """Title of table and pictures: says what was shortened and on which data."""
    parts = [results.table.title]
    task = results.table.task
    usual = sorted({recipe_length(task, cell.dataset) for cell in results.table.cells})
    if results.length is not None and usual != [results.length]:
        parts.append(f'{results.length:,} {task.unit}{"s" * (results.length > 1)} instead of '
                     f'{" and ".join(f"{length:,}" for length in usual)}')
    if results.note:
        parts.append(results.note)
    return ', '.join(parts)


def facts(results: Results, others: Sequence[str] = ()) -> List[str]:
    """Paragraphs below the title: what the runs have beside their recipe, and what the report leaves out.

    Args:
        results: Folder of the runs.
        others: Names of the runs that lie there and are not in the report.
    """
    found = []
    if results.options:
        found.append('Options of every run, beside those of the recipe and the table: '
                     f'`{shlex.join(results.options)}`.')
    if others:
        found.append(f'In the same folder, and not in this report: {", ".join(others)}.')
    return found


def _metric_lines(metric: Metric, rows: Sequence[Row], unit: str) -> List[str]:
    """The table of one metric."""
    lines = [
        f'{metric.name} in percent after the last {unit}: mean and standard deviation over seeds. Difference: from the '
        f'plain network, paired by seed, over the seeds that both have, with its 95 % t-interval; '
        f'{"below" if metric.lower_is_better else "above"} 0 is better than plain.',
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
            row.cell.dataset, row.cell.name, _number(row.paper), here, f'{len(row.values)} of {row.planned}',
            _number(row.difference, sign=True), interval, _number(row.params, 3), _number(row.cell.paper_params, 3),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def write_markdown(
        path: Path,
        heading: str,
        rows: Sequence[Row],
        unit: str,
        paragraphs: Sequence[str] = (),
        more: Sequence[str] = (),
) -> Path:
    """Write the table as Markdown, one for each metric, and more lines below; returns `path`.

    Args:
        path: File to write.
        heading: Title.
        rows: As from `report_rows`.
        unit: 'epoch' or 'iteration'.
        paragraphs: What stands below the title.
        more: Lines to follow.
    """
    lines = [f'# {heading}', *(line for paragraph in paragraphs for line in ('', paragraph))]
    for metric in dict.fromkeys(row.metric for row in rows):
        lines += ['', *_metric_lines(metric, [row for row in rows if row.metric == metric], unit)]
    with writing_text(path) as f:
        f.write('\n'.join([*lines, *more]) + '\n')
    return path


def write_figures(path: Path, rows: Sequence[Row]) -> Path:
    """Write a row for each metric, cell and seed, with the figures of the cell; returns `path`."""
    columns = ['dataset', 'depth', 'cell', 'model', 'metric', 'seed', 'value', 'mean', 'std', 'n', 'difference',
               'lower', 'upper', 'pairs', 'paper', 'params', 'paper_params']
    lines: List[Dict[str, Any]] = []
    for row in rows:
        common: Dict[str, Any] = dict(
            dataset=row.cell.dataset, depth=row.cell.depth, cell=row.cell.key, model=row.cell.model,
            metric=row.metric.key, mean=row.mean, std=row.std, n=len(row.values), difference=row.difference,
            pairs=row.pairs, paper=row.paper, params=round(row.params, 6), paper_params=row.cell.paper_params)
        if row.interval is not None:
            common.update(lower=row.interval[0], upper=row.interval[1])
        lines += [dict(common, seed=seed, value=round(value, 4)) for seed, value in row.values.items()] or [common]
    return write_csv(path, columns, ([line.get(column) for column in columns] for line in lines))
