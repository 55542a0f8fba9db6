"""Writing files that are never half written."""
import hashlib
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .errors import UserError, blame

__all__ = ['check_writable', 'file_digest', 'replacing']


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, whose file takes the place of `path` at the end if nothing went wrong.

    Whoever reads `path`, or interrupts this, finds the old file or the new one, also after a loss of power.
    """
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == 'nt':
        return  # nobody can open folders there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """What tells a file's content from another's."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
