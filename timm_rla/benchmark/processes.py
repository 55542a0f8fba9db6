"""Processes that run one model each.

A model has a process to itself, as it has in use: in one that they share, the largest of them makes the C library hold
memory that the others then need not ask the system for.
"""
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any, Optional

import torch

from . import allocator
from .suites import Setting
from .variants import IN_MEMORY, REGIONAL, REGIONAL_BACKEND, create, recurrent_blocks, suffixes
from .verify import verify
from .workload import Workload

__all__ = ['Process']

_workload: Optional[Workload] = None  # of this process, if it is one that runs a model


def _start(name: str, setting: Setting, threads: int) -> str:
    """Create the model and, if it has layer attention, verify its ops; returns the allocator, '' for a GPU."""
    global _workload
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True  # as timm's benchmark.py
        torch.backends.cudnn.benchmark = True
    model = create(name)
    if recurrent_blocks(model):
        verify(setting, REGIONAL_BACKEND if REGIONAL in suffixes(name) else '')
    _workload = Workload(model, setting, IN_MEMORY in suffixes(name))
    return allocator.describe() if setting.device_type == 'cpu' else ''


def _call(method: str, *args: Any) -> Any:
    return getattr(_workload, method)(*args)


class Process:
    """A process that runs one model, and that keeps freed memory if it runs it on a CPU (`allocator`).

    Args:
        name: As for `variants.create`.
        setting: What to run.
    """

    def __init__(self, name: str, setting: Setting):
        self.name = name
        self._executor = ProcessPoolExecutor(1, get_context('spawn'))
        with allocator.keeping_freed_memory() if setting.device_type == 'cpu' else nullcontext():
            self._started = self._executor.submit(_start, name, setting, torch.get_num_threads())  # starts it at once

    def ready(self) -> str:
        """Wait until the model is there and its ops are verified.

        Returns:
            The allocator, as `allocator.describe` says it; '' for a GPU.

        Raises:
            UserError: The model cannot be created, or an op deviates from its reference.
        """
        return self._started.result()

    def call(self, method: str, *args: Any) -> Any:
        """Result of a method of the process's `Workload`; errors are raised here, those of `ready` too."""
        self._started.result()
        return self._executor.submit(_call, method, *args).result()

    def __enter__(self) -> 'Process':
        return self

    def __exit__(self, *error: Any) -> None:
        self._executor.shutdown(cancel_futures=True)
