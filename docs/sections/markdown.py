"""What the sections share: words and lines of Markdown tables."""
import csv
from pathlib import Path
from typing import Dict, Iterable, List

NOT_MEASURED, NOT_APPLICABLE = 'not measured', '-'


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> List[str]:
    """Lines of a Markdown table."""
    header = list(header)
    return [line(header), '|---' * len(header) + '|', *map(line, rows)]


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f'| {" | ".join(map(str, cells))} |'


def read_rows(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV file."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))
