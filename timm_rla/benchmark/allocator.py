"""What keeps the memory of measuring processes on a CPU.

By its default, glibc gives the memory of a large tensor back to the system as soon as the tensor is freed. The next
layer takes new memory, and the system fills it with zeros page by page: one then times page faults, which hide what
the models themselves cost. So measuring processes are started with settings that make glibc keep what is freed.
"""
import os
import platform
from contextlib import contextmanager
from typing import Iterator

__all__ = ['KEEP_FREED', 'describe', 'keeping_freed_memory']

KEEP_FREED = {
    'MALLOC_MMAP_MAX_': '0',  # large tensors too lie on the heap
    'MALLOC_TRIM_THRESHOLD_': '1000000000000',  # bytes; the heap never shrinks
    'MALLOC_TOP_PAD_': '67108864',  # bytes; it grows in steps of 64 MiB
}
OTHERS = ('jemalloc', 'tcmalloc', 'mimalloc')  # which keep freed memory by themselves
TUNABLES = 'GLIBC_TUNABLES'  # glibc's other name for the same settings


def _preloaded() -> str:
    """Name of the allocator that takes glibc's place, empty if none does."""
    return next((name for name in OTHERS if name in os.environ.get('LD_PRELOAD', '')), '')


def _is_tuned() -> bool:
    return 'glibc.malloc.' in os.environ.get(TUNABLES, '')


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Processes started in here have an allocator that keeps freed memory; the environment is restored at the end.

    What the user has set himself stays: single settings, all of them if he tunes glibc, and another allocator.
    """
    added = {name: value for name, value in KEEP_FREED.items() if name not in os.environ}
    if _preloaded() or _is_tuned() or platform.libc_ver()[0] != 'glibc':
        added = {}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def describe() -> str:
    """The allocator of this process and its settings, such as 'glibc, MALLOC_MMAP_MAX_=0' or 'jemalloc'."""
    if _preloaded():
        return _preloaded()
    names = [*KEEP_FREED, *sorted(name for name in os.environ if name.startswith('MALLOC_') and name not in KEEP_FREED)]
    settings = [f'{name}={os.environ[name]}' for name in names if name in os.environ]
    if _is_tuned():
        settings.append(f'{TUNABLES}={os.environ[TUNABLES]}')
    return ', '.join([platform.libc_ver()[0] or platform.system(), *[' '.join(settings)] * bool(settings)])
