"""summary.csv of a run: one row for each epoch, in the columns of timm. Read whatever is whole, written as a whole."""
import csv
import logging
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .errors import blame
from .files import write_csv
from .trained import EPOCHS

__all__ = ['SUMMARY', 'is_row', 'metric_key', 'read_summary', 'restore_rows', 'sort_key', 'trim_summary',
           'write_row']

SUMMARY = 'summary.csv'
EPOCH = 'epoch'
_logger = logging.getLogger(__name__)


def read_summary(run_dir: Path) -> List[Dict[str, float]]:
    """Rows of a run's summary.csv as numbers, in the order of epochs; none if there is no file.

    What is no row is left out, and said: cut or damaged lines, repeated headers. Of an epoch that stands there twice,
    as after a resume by timm's script, the last row counts.

    Raises:
        UserError: The file cannot be read.
    """
    path = run_dir / SUMMARY
    if not path.is_file():
        return []
    with blame(str(path), OSError), open(path, newline='', encoding='utf-8-sig', errors='replace') as f:
        lines = f.read().replace('\0', '').splitlines()
    header: List[str] = []
    rows: Dict[int, Dict[str, float]] = {}
    damaged = 0
    for line in lines:
        cells = _cells(line)
        if EPOCH in cells:
            header = cells
            continue
        row = _row(header, cells)
        if row is None:
            damaged += bool(line.strip())
        else:
            rows[int(row[EPOCH])] = row
    if damaged:
        _logger.warning(f'{path}: {damaged} damaged line{"s" if damaged > 1 else ""} left out')
    return [rows[epoch] for epoch in sorted(rows)]


def _cells(line: str) -> List[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _row(header: List[str], cells: List[str]) -> Optional[Dict[str, float]]:
    """A row as numbers; None if it is no whole one."""
    if not header or len(cells) != len(header):
        return None
    try:
        row = {key: float(value) for key, value in zip(header, cells) if value}
    except ValueError:
        return None
    epoch = row.get(EPOCH, -1)
    return row if 0 <= epoch < EPOCHS and epoch == int(epoch) else None


def is_row(value: Any) -> bool:
    """True if a value out of a checkpoint is the row of an epoch: numbers by their columns."""
    return (
        isinstance(value, dict)
        and isinstance(value.get(EPOCH), int)
        and all(isinstance(key, str) and isinstance(number, (int, float)) for key, number in value.items())
    )


def write_row(run_dir: Path, row: Dict[str, float]) -> None:
    """Add the row of an epoch, or replace it.

    Args:
        run_dir: Folder of the run.
        row: Numbers by their columns, the first `epoch`.

    Raises:
        UserError: The file cannot be written; it is as it was then.
    """
    before = [other for other in read_summary(run_dir) if other[EPOCH] < row[EPOCH]]
    _write(run_dir / SUMMARY, [*before, row])


def restore_rows(run_dir: Path, rows: List[Dict[str, float]]) -> None:
    """Add rows of epochs that the file does not have."""
    known = {row[EPOCH]: row for row in [*rows, *read_summary(run_dir)]}
    _write(run_dir / SUMMARY, [known[epoch] for epoch in sorted(known)])


def trim_summary(run_dir: Path, start_epoch: int) -> None:
    """Drop rows of epochs that will be run again, and what is no row."""
    path = run_dir / SUMMARY
    if path.is_file():
        _write(path, [row for row in read_summary(run_dir) if row[EPOCH] < start_epoch])


def _write(path: Path, rows: List[Dict[str, float]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path, columns, ([dict(row, epoch=int(row[EPOCH])).get(name) for name in columns] for row in rows))


def metric_key(row: Dict[str, float], metric: str) -> str:
    """Column of a metric: that of the validation, or of the training where there is no validation."""
    return f'eval_{metric}' if f'eval_{metric}' in row else f'train_{metric}'


def sort_key(value: float, decreasing: bool) -> Tuple[bool, float]:
    """What is less the better a value of a metric is; NaN is the worst. `decreasing`: lower is better."""
    return math.isnan(value), value if decreasing else -value
