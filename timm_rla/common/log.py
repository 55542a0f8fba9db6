"""Messages on the terminal and in logs: those of this package, and the warnings of all others."""
import logging
import sys

from huggingface_hub.utils import disable_progress_bars

__all__ = ['setup_logging']


def setup_logging() -> None:
    """Write messages to standard error, with date and time where that is no terminal. Can be called again."""
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
