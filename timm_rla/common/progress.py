"""Progress of an epoch: a bar on a terminal, plain lines at intervals in a log."""
import logging
import sys
import time
from datetime import timedelta
from typing import Optional

from huggingface_hub.utils import tqdm

__all__ = ['Progress', 'show_rate']

_logger = logging.getLogger(__name__)


def show_rate(images: int, seconds: float) -> str:
    """Images per second, to three digits."""
    rate = images / max(seconds, 1e-9)
    return f'{rate:.0f} img/s' if rate >= 100 else f'{rate:#.3g} img/s'


class Progress:
    """Shows how far an epoch is, how fast it runs and how long the rest takes.

    Args:
        label: What runs, such as 'Train 3/160'.
        total: Steps of this epoch, None where nobody knows.
        interval: Steps between lines in a log.
        later: Steps after this epoch that the remaining time counts in.
        enabled: Show anything, in the primary process only.
    """

    def __init__(self, label: str, total: Optional[int], interval: int, later: int = 0, enabled: bool = True):
        self.label = label
        self.total = total
        self.interval = interval
        self.later = later
        self.enabled = enabled
        self.step = 0
        self.images = 0
        self.start = time.perf_counter()
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, desc=label, leave=False, dynamic_ncols=True, bar_format='{l_bar}{bar}|{postfix}')

    def update(self, images: int, **values: str) -> None:
        """Count a step of so many images (over all processes), and show named values with it."""
        self.step += 1
        self.images += images
        if not self.enabled:
            return
        elapsed = time.perf_counter() - self.start
        shown = [show_rate(self.images, elapsed), *(f'{name} {value}' for name, value in values.items())]
        if self.total is not None:
            left = timedelta(seconds=int(elapsed / self.step * (self.total - self.step + self.later)))
            shown.insert(1, f'{left} left')
        if self.bar is not None:
            self.bar.set_postfix_str(', '.join(shown), refresh=False)
            self.bar.update()
        elif self.step % self.interval == 0:
            count = self.step if self.total is None else f'{self.step}/{self.total}'
            _logger.info('  '.join([f'{self.label} [{count}]', *shown]))

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_) -> None:
        self.close()
