"""What a user did wrong, said in one line. The command line prints it and leaves with exit code 2."""
import difflib
import re
from contextlib import contextmanager
from typing import Iterable, Iterator, Type

__all__ = ['UserError', 'blame', 'closest', 'one_line', 'printable']

LENGTH = 1000  # characters of a message
WORKER = re.compile(r'Caught \w+ in .* process \d+\.\n')


class UserError(Exception):
    """Bad input. Its message names the bad value and, where there is a choice, the allowed ones."""

    def __str__(self) -> str:
        message = super().__str__().strip()
        if WORKER.match(message):  # a data loader hands on the traceback as text, the message in the last line
            message = message.splitlines()[-1].split('UserError: ', 1)[-1]
        message = printable(message)
        half = LENGTH // 2
        return message if len(message) <= LENGTH else f'{message[:half]} ... {message[-half:]}'


def printable(text: str) -> str:
    """A text in one line that a terminal shows as it is: newlines, control sequences and the like as escapes."""
    return ''.join(sign if sign.isprintable() else sign.encode('unicode_escape').decode() for sign in text)


def one_line(error: BaseException) -> str:
    """Message of an exception in one line; its type where it has none."""
    return ' '.join(str(error).split()) or type(error).__name__


@contextmanager
def blame(subject: str, *errors: Type[Exception]) -> Iterator[None]:
    """Turn errors that a library raises for bad input into a UserError about `subject`.

    Args:
        subject: What the user gave, such as '--model foo'.
        *errors: Types of exceptions that bad input leads to here. All others are faults of the program.
    """
    try:
        yield
    except errors as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f'{subject}: {one_line(e)}') from e


def closest(name: str, names: Iterable[str]) -> str:
    """The names most like one that does not exist, as the end of a message."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f'did you mean {" or ".join(close)}?' if close else 'nothing is named like it'
