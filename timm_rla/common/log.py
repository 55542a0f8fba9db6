"""Messages on the terminal and in logs: those of this package, and the warnings of all others."""
import logging
import sys
import warnings
from typing import Any, Type

from huggingface_hub.utils import disable_progress_bars

from .errors import one_line

__all__ = ['setup_logging']


def _one_line_warning(message: Any, category: Type[Warning], *where: Any) -> str:
    return f'{category.__name__}: {one_line(message)}\n'


def setup_logging() -> None:
    """Write messages to standard error, with date and time where that is no terminal. Can be called again."""
    warnings.formatwarning = _one_line_warning
    in_terminal = sys.stderr.isatty()
    handler = logging.StreamHandler()
    handler.set_name('timm_rla')
    handler.setFormatter(logging.Formatter(
        '%(message)s' if in_terminal else '%(asctime)s  %(message)s', '%Y-%m-%d %H:%M:%S'))
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if other.get_name() != handler.get_name()] + [handler]
    logging.getLogger('timm_rla').setLevel(logging.INFO)
    logging.getLogger('huggingface_hub').propagate = False  # it has a handler of its own
    if not in_terminal:
        disable_progress_bars()  # of its transfers
