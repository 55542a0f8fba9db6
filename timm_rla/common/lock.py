"""One writer for a folder."""
import os
import socket
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Callable, Iterator

from filelock import FileLock, Timeout

from .errors import UserError, blame

__all__ = ['exclusive', 'held_by']

LOCK, HOLDER = '.lock', '.holder'
PATIENCE = 0.5  # seconds: `held_by` takes the lock for a moment, too


@contextmanager
def exclusive(folder: Path, refusal: Callable[[str], str]) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which is made. The death of this one frees it.

    Args:
        folder: The folder. If it is new, and nothing has come of it in the end, it goes again.
        refusal: Message to whoever is kept out, from a text that says who holds the folder, empty if it is not known.

    Raises:
        UserError: Another process holds it, or it cannot be made.
    """
    with blame(str(folder), OSError, ValueError):  # ValueError: a null in the name
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(folder / LOCK, timeout=PATIENCE), folder / HOLDER
        try:
            lock.acquire()
        except Timeout as e:
            raise UserError(refusal(_text(holder))) from e
        holder.write_text(f'process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S},')
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        if made and [file.name for file in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            with suppress(OSError):  # not empty: another process is there by now
                for path in made:
                    path.rmdir()
        lock.release()


def held_by(folder: Path) -> str:
    """What holds a folder at this moment, as `exclusive` says it; empty if nothing does."""
    if not (folder / LOCK).is_file():
        return ''
    try:
        with FileLock(folder / LOCK, timeout=0):
            return ''
    except Timeout:
        return _text(folder / HOLDER).rstrip(',') or 'another process'
    except OSError:
        return ''  # the run itself will say what is wrong with it


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ''
