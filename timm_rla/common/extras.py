"""Libraries that come with an extra, imported where they are needed; a missing one says what installs it."""
import importlib
from types import ModuleType

from .errors import UserError

__all__ = ['import_extra']


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module.

    Raises:
        UserError: It is not installed; the message tells the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise UserError(f"{module.split('.')[0]} is not installed: pip install 'timm_rla[{extra}]'") from e
