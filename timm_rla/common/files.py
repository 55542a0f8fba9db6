"""Writing files that are never half written."""
import csv
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Tuple, Union

from .errors import UserError, blame, one_line

__all__ = [
    'TEMPORARY', 'check_outputs', 'check_writable', 'file_digest', 'folder_of_run', 'replacing', 'write_csv',
    'writing_text',
]

TEMPORARY = '.timm-rla.tmp'  # end of the names of files that are not whole yet
OF_A_RUN = ('summary.csv', 'args.yaml')  # files of a training run, which nothing but a run writes


def _temporary(path: Path) -> Path:
    """Name that a file has until it is whole: this package's own, so that no file of anyone else is in its place."""
    return path.with_name(f'{path.name}{TEMPORARY}')


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, whose file takes the place of `path` at the end if nothing went wrong.

    Whoever reads `path`, or interrupts this, finds the old file or the new one, also after a loss of power. A link
    stays one: what it points to is written.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_text(path: Path) -> Iterator[Any]:
    """A file to write text to, in UTF-8 whatever the locale, that takes the place of `path` when it is whole.

    Names of files and classes may have bytes that are no text; they are written as escapes.
    """
    with replacing(path) as temporary, \
            open(temporary, 'w', newline='', encoding='utf-8', errors='backslashreplace') as f:
        yield f


def write_csv(path: Path, header: Iterable[Any], rows: Iterable[Iterable[Any]], option: str = '') -> Path:
    """Write a table as CSV; returns `path`.

    Args:
        path: File to write.
        header: Names of the columns.
        rows: Entries by column; None is an empty one.
        option: What names the file, for the message.

    Raises:
        UserError: It cannot be written.
    """
    with blame(f'{option} {path}'.strip(), OSError), writing_text(path) as f:
        csv.writer(f).writerows([header, *rows])
    return path


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == 'nt':
        return  # nobody can open folders there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_of_run(output: str, experiment: str) -> Path:
    """Folder `output/experiment`, also where the name has several parts.

    Raises:
        UserError: The name leads out of `output`, or is none.
    """
    path = Path(experiment)
    if path.is_absolute() or not path.parts or '..' in path.parts:
        raise UserError(f'--experiment {experiment}: must be the name of a folder inside of --output')
    return Path(output) / path


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
    if os.path.isdir(path):  # not path.is_dir(), which fails with names that are too long
        raise UserError(f'{option} {path}: is a folder')
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{option} {path}: is no plain file')
    try:
        temporary = _temporary(Path(os.path.realpath(path)))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink(missing_ok=True)
    except FileExistsError as e:
        raise UserError(f'{option} {path}: {e.filename} is no folder') from e
    except (OSError, ValueError) as e:  # ValueError: a null in the name; the reason alone, names may be long
        raise UserError(f'{option} {path}: {getattr(e, "strerror", None) or one_line(e)}') from e


def check_outputs(outputs: Iterable[Tuple[str, Path]], inputs: Iterable[Union[str, Path]] = ()) -> None:
    """Make sure, before the work for them is done, that files can be written, each to a place of its own.

    Args:
        outputs: Option and file, of all that a command writes, also of what it names by itself.
        inputs: Files that it reads.

    Raises:
        UserError: One cannot be written, or would take the place of what the command reads or writes otherwise, or of
            the log of a training run.
    """
    outputs = list(outputs)
    read = {_identity(path) for path in inputs} if outputs else set()  # a million images take their time
    written: Dict[Any, Path] = {}
    for option, path in outputs:
        check_writable(path, option)
        identity = _identity(path)
        if identity in read:
            raise UserError(f'{option} {path}: is what the command reads; choose another name')
        if identity in written:
            raise UserError(f'{option} {path}: the same file as {written[identity]}, which is written, too')
        if path.name in OF_A_RUN and path.exists():
            raise UserError(f'{option} {path}: is there, of a training run; choose another name')
        written[identity] = path


def _identity(path: Union[str, Path]) -> Any:
    """The same for two names of one file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # not there
        return os.path.realpath(path)
    return found.st_dev, found.st_ino
