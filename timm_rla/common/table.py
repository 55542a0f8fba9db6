"""Tables as text."""
from typing import Sequence

from .errors import printable

__all__ = ['format_columns']


def format_columns(rows: Sequence[Sequence[str]], left: int) -> str:
    """Lines with the cells of a column below each other; the first `left` columns to the left, others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(
        cell.ljust(width) if index < left else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths))
    ).rstrip() for row in rows)
