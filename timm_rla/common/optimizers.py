"""timm's optimizers by name."""
from contextlib import contextmanager
from typing import Iterator

from timm.optim import list_optimizers

from .errors import UserError, blame, closest

__all__ = ['HYPERPARAMETERS', 'blame_optimizer', 'is_same_optimizer']

# Of the entries of parameter groups: what options say, other than the learning rate, and loading a state sets
HYPERPARAMETERS = frozenset({'weight_decay', 'momentum', 'betas', 'eps', 'nesterov'})

SGD = {'momentum', 'nesterov', 'sgd'}  # timm's names for one optimizer, whose state is the same


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


def is_same_optimizer(first: str, second: str) -> bool:
    """True if one can go on from the state of the other."""
    first, second = first.lower(), second.lower()
    return first == second or {first, second} <= SGD
