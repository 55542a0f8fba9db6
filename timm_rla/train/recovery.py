"""Going on within an epoch: what is kept in the middle of one, and how the data loader gets back to that point.

The generators of the data workers cannot be put into the middle of an epoch. They start as the epoch did, and all
batches that were trained on are loaded once more and dropped. Then follow those that an uninterrupted run would see.
"""
import itertools
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from timm.utils import AverageMeter

from ..common.device import Placement
from ..common.stopping import ASKED, Stopped, StopRequest
from .rng import get_rng_state, set_rng_state

__all__ = ['Position', 'Watch']


@dataclass(frozen=True)
class Position:
    """How far into an epoch a process has come: before its first batch, between two, or behind the last."""
    batches: int = 0  # that are trained on
    loss_sum: float = 0.  # over images
    images: int = 0
    before: Dict[str, Any] = field(default_factory=dict)  # generators before the last of these batches was fetched
    now: Dict[str, Any] = field(default_factory=dict)  # generators now
    validates: bool = False  # running statistics of batch norm are shared already, validation comes next


class Watch:
    """Looks after the steps of an epoch: keeps a position at intervals and when the run is asked to stop.

    Args:
        stop: Signals of this process.
        placement: Of this process.
        interval: Optimizer steps between positions that are kept, none if 0.
        keep: Keeps a position, in all processes at the same point.
        position: Where the epoch begins.
    """

    def __init__(
            self,
            stop: StopRequest,
            placement: Placement,
            interval: int,
            keep: Callable[[Position], None],
            position: Position = Position(),
    ):
        self.stop = stop
        self.placement = placement
        self.interval = interval
        self.keep = keep
        self.position = position
        self._stops = False
        self._before: Optional[Dict[str, Any]] = None  # generators, if the next position is kept
        self._trained = (position.batches, position.loss_sum, position.images)

    def batches(self, loader: Any, ends_step: Callable[[int], bool], accum_steps: int) -> Iterator[Tuple[int, Any]]:
        """Numbered batches of a loader, from the position on.

        Args:
            loader: Training loader of this process.
            ends_step: Whether an optimizer step follows on a batch.
            accum_steps: Batches in a step.
        """
        iterator = iter(loader)
        done = self.position.batches
        for batch in range(done):
            if self.stop.agreed(self.placement):  # what is kept is kept already
                raise Stopped(ASKED)
            if batch == done - 1 and self.position.before:
                set_rng_state(self.position.before)  # a prefetcher erases regions of the next batch already
            next(iterator, None)
        if done and self.position.now:
            set_rng_state(self.position.now)
        for batch in itertools.count(done):
            self._before = get_rng_state() if ends_step(batch) and self._is_due(batch // accum_steps + 1) else None
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield batch, item

    def _is_due(self, steps: int) -> bool:
        self._stops = self.stop.agreed(self.placement)
        return self._stops or bool(self.interval) and steps % self.interval == 0

    def reached(self, batches: int, losses: AverageMeter) -> None:
        """Keep the position behind so many batches if it is due.

        Raises:
            Stopped: The run was asked to stop.
        """
        self._trained = (batches, losses.sum, losses.count)
        if self._before is not None:
            self.keep(Position(*self._trained, self._before, get_rng_state()))
            self._before = None
            if self._stops:
                raise Stopped(ASKED)

    def validation(self) -> Callable[[], None]:
        """What to call after each batch of the validation that begins now.

        It raises Stopped if the run was asked to stop, after it has kept the position where validation begins.
        """
        position = Position(*self._trained, now=get_rng_state(), validates=True)

        def check() -> None:
            if self.stop.agreed(self.placement):
                self.keep(position)
                raise Stopped(ASKED)

        return check
