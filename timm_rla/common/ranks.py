"""Errors of several processes under torchrun: each is said once, by the process that it came from."""
import os
from datetime import timedelta
from typing import Optional

import torch.distributed as dist

__all__ = ['failed_elsewhere', 'is_first_to_say', 'where']

FAILED = 'failed'
SECONDS = 5  # to reach the others


def _world_size() -> int:
    size = os.environ.get('WORLD_SIZE', '1')
    return int(size) if size.isdigit() else 1


def where() -> str:
    """Beginning of a message: the process that it comes from, nothing if there is one alone."""
    return f'rank {os.environ.get("RANK", "0")}: ' if _world_size() > 1 else ''


def _store() -> Optional[dist.Store]:
    """What torchrun lets the processes share; None if it cannot be reached."""
    try:
        store = dist.TCPStore(
            os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
            timeout=timedelta(seconds=SECONDS))
        return dist.PrefixStore(f'timm_rla/{os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}', store)
    except (KeyError, ValueError, RuntimeError):
        return None


def is_first_to_say(message: str) -> bool:
    """True if no other process has said the same, apart from where it comes from; tells the others that one failed."""
    if _world_size() == 1:
        return True
    store = _store()
    try:
        return store is None or (store.add(FAILED, 1) > 0 and store.add(message.replace(where(), ''), 1) == 1)
    except RuntimeError:
        return True


def failed_elsewhere() -> bool:
    """True if another process has said why it ends."""
    if _world_size() == 1:
        return False
    store = _store()
    if store is None:
        return False
    try:
        store.wait([FAILED], timedelta(seconds=SECONDS))
    except RuntimeError:
        return False
    return True
