"""Modules that are imported where they are needed: libraries that come with an extra, and a user's own."""
import importlib
import os
import sys
from types import ModuleType
from typing import Sequence

from .errors import UserError, blame

__all__ = ['import_extra', 'import_modules']


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module.

    Raises:
        UserError: It is not installed; the message tells the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise UserError(f"{module.split('.')[0]} is not installed: pip install 'timm_rla[{extra}]'") from e


def import_modules(names: Sequence[str], subject: str) -> None:
    """Import modules that change or register something, installed ones or of the current folder.

    Args:
        names: Of the modules.
        subject: What the user gave, for messages.

    Raises:
        UserError: There is no such module, or it cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides a library
    for name in names:
        with blame(f'{subject} {name or repr(name)}', ImportError, ValueError):
            importlib.import_module(name)
