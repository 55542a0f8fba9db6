"""State of the random number generators, of this process and of its data workers, so that a run can go on exactly.

timm keeps its data workers alive over epochs, and with them the generators that draw the augmentations. A run that goes
on bit for bit therefore needs their states too.
"""
import atexit
import os
import pickle
import random
import signal
from types import FrameType
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from ..common.stopping import SIGNALS

__all__ = ['RngTracker', 'get_rng_state', 'set_rng_state']

STATE_BYTES = 1 << 15  # about 11 KiB are needed


def get_rng_state() -> Dict[str, Any]:
    """State of Python's, NumPy's and torch's generators in types that `torch.load(weights_only=True)` accepts."""
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_rng_state(state: Dict[str, Any]) -> None:
    """Put all generators back into a state from `get_rng_state`."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if state['cuda'] and torch.cuda.device_count() == len(state['cuda']):
        torch.cuda.set_rng_state_all(state['cuda'])


def _worker_state() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


class RngTracker:
    """Knows the generators' state of each worker of a data loader, and starts workers from given states.

    Takes the place of the loader's collate function, the last thing that a worker does with a batch and that may draw
    random numbers: each worker then leaves its state in shared memory. Mixup, if that is the collate function, is
    switched off for all workers here as well, since they hold copies of it.

    Args:
        loader: Data loader of timm, with the prefetcher or without, not yet iterated over.
        states: States of the workers to start from, as from `states()`.
    """

    def __init__(self, loader: Any, states: Optional[List[Any]] = None):
        loader = loader if isinstance(loader, DataLoader) else loader.loader
        self.workers = loader.num_workers
        self.collate_fn = loader.collate_fn
        self.worker_init_fn = loader.worker_init_fn
        self.initial_states = states if any(state is not None for state in states or []) else None
        self.memory = torch.zeros(loader.num_workers, STATE_BYTES, dtype=torch.uint8).share_memory_()
        self.mixup = torch.ones((), dtype=torch.uint8).share_memory_()
        self.closing = torch.zeros((), dtype=torch.uint8).share_memory_()
        atexit.register(self.closing.fill_, 1)
        loader.collate_fn = self
        loader.worker_init_fn = self.init_worker
        if self.initial_states and loader.num_workers:
            # the start of the workers draws their seed from here, not from the generator that has been put back
            loader.generator = torch.Generator()

    def __call__(self, batch: List[Any]) -> Any:
        if hasattr(self.collate_fn, 'mixup_enabled'):
            self.collate_fn.mixup_enabled = bool(self.mixup)
        batch = self.collate_fn(batch)
        worker = get_worker_info()
        if worker is not None:
            state = np.frombuffer(_worker_state(), dtype=np.uint8)
            self.memory[worker.id, :len(state)] = torch.from_numpy(state.copy())
        return batch

    def init_worker(self, worker_id: int) -> None:
        """Start a worker as timm does, then put its generators into its initial state.

        Schedulers send their signals to all processes of a job. A worker leaves them to the main process, which needs
        it for one more step: it ends when the main process ends it, or has died.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self.worker_init_fn(worker_id)
        if self.initial_states and worker_id < len(self.initial_states) and self.initial_states[worker_id]:
            python, numpy, torch_state = self.initial_states[worker_id]
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(torch_state)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if self.closing:
            os._exit(0)

    def disable_mixup(self) -> None:
        """Switch mixup and cutmix off from the next batch that a worker begins."""
        self.mixup.zero_()

    def states(self) -> List[Any]:
        """State of each worker after its last batch; None for a worker that has not had one."""
        states: List[Any] = []
        for row in self.memory:
            if not row.any():
                states.append(None)
                continue
            python, (name, keys, *rest), torch_state = pickle.loads(row.numpy().tobytes())
            states.append((python, (name, keys.tolist(), *rest), torch.from_numpy(torch_state.copy())))
        return states
