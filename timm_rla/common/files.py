"""Writing files that are never half written."""
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .errors import UserError, blame

__all__ = ['check_writable', 'replacing']


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, whose file takes the place of `path` at the end if nothing went wrong.

    Whoever reads `path`, or interrupts this, finds the old file or the new one.
    """
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, option: str) -> None:
    """Make sure, before the work for it is done, that a file can be written; makes its folder.

    Args:
        path: The file.
        option: Option that names it.

    Raises:
        UserError: It cannot.
    """
    if path.is_dir():
        raise UserError(f'{option} {path}: is a folder')
    with blame(f'{option} {path}', OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
