"""timm's optimizers by name."""
from contextlib import contextmanager
from typing import Iterator

from timm.optim import list_optimizers

from .errors import UserError, blame, closest

__all__ = ['blame_optimizer']


@contextmanager
def blame_optimizer(name: str) -> Iterator[None]:
    """Context in which an optimizer is created, as --opt names it.

    Raises:
        UserError: No such optimizer, or arguments that it rejects.
    """
    if name.lower().removeprefix('lookahead_') not in list_optimizers():
        raise UserError(f'--opt {name}: no such optimizer (timm.optim.list_optimizers() lists them); '
                        f'{closest(name, list_optimizers())}')
    with blame(f'--opt {name}', ArithmeticError, AssertionError, ImportError, LookupError, RuntimeError, TypeError,
               ValueError):
        yield
