"""What the sections share: words and lines of Markdown tables."""
import csv
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

NOT_MEASURED, NOT_APPLICABLE = 'not measured', '-'


def table(header: Sequence[str], rows: Iterable[Iterable[object]]) -> List[str]:
    """Lines of a Markdown table."""
    head, *lines = (f'| {" | ".join(map(str, cells))} |' for cells in (header, *rows))
    return [head, '|---' * len(header) + '|', *lines]


def read_rows(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV file."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))
