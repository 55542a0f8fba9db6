"""Writing files that are never half written."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

__all__ = ['replacing']


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, whose file takes the place of `path` at the end if nothing went wrong.

    Whoever reads `path`, or interrupts this, finds the old file or the new one.
    """
    temporary = path.with_name(f'{path.name}.tmp')
    yield temporary
    os.replace(temporary, path)
