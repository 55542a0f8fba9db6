"""Being asked to stop: SIGTERM and SIGUSR1, which schedulers send before they end a job, and a terminal's SIGHUP."""
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type

import torch

from .device import Placement

__all__ = ['ASKED', 'SIGNALS', 'StopRequest', 'Stopped', 'leave_signals']

ASKED = 'asked to stop by a signal; --resume auto goes on with this run'
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGHUP') if hasattr(signal, name))


class Stopped(BaseException):
    """A process was asked to stop, and has left what it takes to go on another time.

    No Exception, since it may come at any point: who handles the errors of a file is not to take it for one.
    """


class StopRequest:
    """Context in which signals to stop are remembered, instead of ending the process at once.

    One that is ignored, as nohup has it, stays so.

    Args:
        at_once: Raise Stopped where the process is, until `remember` is called: there is nothing to keep yet.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.received = False
        self._at_once = at_once
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():  # others cannot receive signals
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS
                            if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(
            self,
            kind: Optional[Type[BaseException]],
            error: Optional[BaseException],
            traceback: Optional[TracebackType],
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.received = True
        if self._at_once:
            self._at_once = False  # once; what follows is the end
            raise Stopped(ASKED)

    def remember(self) -> None:
        """Remember signals from now on."""
        self._at_once = False

    def agreed(self, placement: Placement) -> bool:
        """True in all processes of a run if one of them has been asked; all must call it at the same point."""
        if not placement.distributed:
            return self.received
        flag = torch.tensor(int(self.received), device=placement.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def leave_signals(worker_id: int) -> None:
    """In a process that loads data: leave the signals, which schedulers send to all, to the main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
