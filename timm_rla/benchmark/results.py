"""The table of results: CSV in the columns of timm's results/benchmark-*.csv and some more, and the same to read."""
import csv
from pathlib import Path
from typing import Any, Dict, List, Sequence

from ..common.errors import UserError, blame
from ..common.files import check_writable, write_csv
from ..common.table import format_columns
from .suites import Setting

__all__ = ['COLUMNS', 'check_output', 'find', 'format_rows', 'read', 'update']

COLUMNS = (
    'model',
    # of the one mode or the other: images per second and ms per step, medians over rounds, and timm's other columns
    'infer_samples_per_sec', 'infer_step_time', 'infer_batch_size', 'infer_img_size', 'infer_gmacs', 'infer_macts',
    'train_samples_per_sec', 'train_step_time', 'train_batch_size', 'train_img_size',
    'param_count',
    # images per second in relation to the baseline's: median and quartiles over rounds
    'mode', 'baseline', 'ratio', 'ratio_lower', 'ratio_upper', 'rounds',
    # of one step, with parameters, gradients and state of the optimizer
    'peak_memory_mib', 'memory_ratio',
    'precision', 'layout', 'torchcompile', 'torchcompile_mode', 'device', 'threads',
    'allocator',  # of the measuring processes on a CPU, with its settings
    'date', 'hardware', 'python', 'torch', 'timm', 'timm_rla',
)
KEY = (  # a new row takes the place of one that agrees in these
    'model', 'mode', 'infer_batch_size', 'infer_img_size', 'train_batch_size', 'train_img_size', 'baseline',
    'precision', 'layout', 'torchcompile', 'torchcompile_mode', 'device', 'hardware',
)

Row = Dict[str, str]


def read(path: Path) -> List[Row]:
    """Rows of a table, none if there is no file.

    Raises:
        UserError: The file is no such table.
    """
    if not path.exists():
        return []
    with blame(f'--output {path}', OSError, ValueError, csv.Error), open(path, newline='', encoding='utf-8') as f:
        reader = csv.DictReader(f)
        rows = list(reader)
        if reader.fieldnames is None or set(reader.fieldnames) != set(COLUMNS):
            raise UserError(f'--output {path}: there is a file of that name, with other columns than these results')
    return rows


def check_output(path: Path) -> None:
    """Make sure, before anything is measured, that a table can be written there.

    Raises:
        UserError: It cannot.
    """
    read(path)
    check_writable(path, '--output')


def update(path: Path, rows: Sequence[Dict[str, Any]]) -> None:
    """Write rows into a table, in the place of earlier ones of the same model, setting and hardware.

    Args:
        path: The table; it need not exist.
        rows: As from `measure`.

    Raises:
        UserError: It is no such table, or cannot be written.
    """
    table = {tuple(row[column] for column in KEY): row for row in read(path)}
    for row in rows:
        text = {column: str(row.get(column, '')) for column in COLUMNS}
        table[tuple(text[column] for column in KEY)] = text
    write_csv(path, COLUMNS, ([row.get(column) for column in COLUMNS] for row in table.values()), '--output')


def find(rows: Sequence[Row], setting: Setting) -> Dict[str, Row]:
    """The latest row of each model of a setting, those not measured left out."""
    found = [row for row in rows if row['model'] in setting.models
             and all(row[column] == value for column, value in setting.columns().items())]
    return {row['model']: row for row in sorted(found, key=lambda row: row['date'])}


def format_rows(rows: Sequence[Dict[str, Any]]) -> str:
    """Rows of one setting as lines to read."""
    header = ('model', 'images/s', 'ratio', 'quartiles', 'memory', 'ratio', 'parameters')
    lines = [header] + [
        (
            row['model'],
            f'{row[row["mode"] + "_samples_per_sec"]:.1f}',
            f'{row["ratio"]:.3f}',
            f'{row["ratio_lower"]:.3f} to {row["ratio_upper"]:.3f}',
            f'{row["peak_memory_mib"]:.0f} MiB',
            f'{row["memory_ratio"]:.3f}',
            f'{row["param_count"]:.2f} M',
        ) + ((f'{row["infer_gmacs"]:.2f}',) if 'infer_gmacs' in row else ())
        for row in rows
    ]
    if 'infer_gmacs' in rows[0]:
        lines[0] += ('GMACs',)
    return format_columns(lines, left=1)
