"""summary.csv of a run: one row for each epoch, as timm writes it."""
import csv
from pathlib import Path
from typing import Dict, List, Optional

from .files import replacing

__all__ = ['SUMMARY', 'best_row', 'metric_key', 'read_summary', 'trim_summary']

SUMMARY = 'summary.csv'


def read_summary(run_dir: Path) -> List[Dict[str, float]]:
    """Rows of a run's summary.csv as numbers, in the order of epochs; none if there is no file."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return []
    with open(path, newline='') as f:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)]


def trim_summary(run_dir: Path, start_epoch: int) -> None:
    """Drop rows of epochs that will be run again."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return
    with open(path, newline='') as f:
        header, *rows = csv.reader(f)
    whole = (row for row in rows if len(row) == len(header))  # a kill can cut the last one short
    with replacing(path) as temporary, open(temporary, 'w', newline='') as f:
        csv.writer(f).writerows([header, *(row for row in whole if int(row[0]) < start_epoch)])


def metric_key(row: Dict[str, float], metric: str) -> str:
    """Column of a metric: that of the validation, or of the training where there is no validation."""
    return f'eval_{metric}' if f'eval_{metric}' in row else f'train_{metric}'


def best_row(rows: List[Dict[str, float]], metric: str) -> Optional[Dict[str, float]]:
    """First row with the best value of a metric, such as 'top1' or 'loss', as timm's checkpoint saver counts it."""
    if not rows:
        return None
    key = metric_key(rows[0], metric)
    return (min if metric == 'loss' else max)(rows, key=lambda row: row[key])
