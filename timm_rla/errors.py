"""What a user did wrong, said in one line. The command line prints it and leaves with exit code 2."""
import difflib
from contextlib import contextmanager
from typing import Iterable, Iterator, Tuple, Type

__all__ = ['UserError', 'blame', 'closest']


class UserError(Exception):
    """Bad input. Its message names the bad value and, where there is a choice, the allowed ones."""

    def __str__(self) -> str:
        # A data loader hands on the errors of its workers with their traceback as text, the message in the last line
        return super().__str__().strip().splitlines()[-1].split('UserError: ', 1)[-1]


@contextmanager
def blame(subject: str, *errors: Type[Exception]) -> Iterator[None]:
    """Turn errors that a library raises for bad input into a UserError about `subject`.

    Args:
        subject: What the user gave, such as '--model foo'.
        *errors: Types of exceptions that bad input leads to; those usual in timm and torch if none is given.
    """
    kinds: Tuple[Type[Exception], ...] = errors or (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
        ValueError,
    )
    try:
        yield
    except kinds as e:
        if isinstance(e, UserError):
            raise
        message = ' '.join(str(e).split()) or type(e).__name__
        raise UserError(f'{subject}: {message}') from e


def closest(name: str, names: Iterable[str]) -> str:
    """The names most like one that does not exist, or where to find them all, as the end of a message."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f'did you mean {" or ".join(close)}?' if close else 'nothing is named like it'
