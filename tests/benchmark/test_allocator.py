"""What measuring processes are told about freed memory, and what is said of it."""
import os
import platform

import pytest

from timm_rla.benchmark import allocator
from timm_rla.benchmark.allocator import KEEP_FREED

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='about glibc')
ALL = ' '.join(f'{name}={value}' for name, value in KEEP_FREED.items())


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith('MALLOC_') or name in ('LD_PRELOAD', 'GLIBC_TUNABLES'):
            monkeypatch.delenv(name)


def inside():
    with allocator.keeping_freed_memory():
        return {name: os.environ.get(name) for name in KEEP_FREED}, allocator.describe()


def test_freed_memory_is_kept_in_processes_started_inside_only():
    before = dict(os.environ)
    assert inside() == (KEEP_FREED, f'glibc, {ALL}')
    assert os.environ == before and allocator.describe() == 'glibc'
    with pytest.raises(KeyError), allocator.keeping_freed_memory():
        raise KeyError
    assert os.environ == before


def test_what_the_user_has_set_wins(monkeypatch):
    monkeypatch.setenv('MALLOC_TOP_PAD_', '4096')
    monkeypatch.setenv('MALLOC_ARENA_MAX', '1')
    found, text = inside()
    assert found == {**KEEP_FREED, 'MALLOC_TOP_PAD_': '4096'} and os.environ['MALLOC_TOP_PAD_'] == '4096'
    assert text == ('glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=4096 '
                    'MALLOC_ARENA_MAX=1')


@pytest.mark.parametrize('variable, value, text', [
    ('LD_PRELOAD', '/usr/lib/libjemalloc.so.2', 'jemalloc'),
    ('LD_PRELOAD', '/usr/lib/libiomp5.so:/usr/lib/libtcmalloc_minimal.so.4', 'tcmalloc'),
    ('GLIBC_TUNABLES', 'glibc.malloc.mmap_max=0', 'glibc, GLIBC_TUNABLES=glibc.malloc.mmap_max=0'),
])
def test_nothing_is_set_for_another_allocator_or_tunables(monkeypatch, variable, value, text):
    monkeypatch.setenv(variable, value)
    assert inside() == (dict.fromkeys(KEEP_FREED), text)


def test_other_preloaded_libraries_do_not_matter(monkeypatch):
    monkeypatch.setenv('LD_PRELOAD', '/usr/lib/libiomp5.so')
    assert inside() == (KEEP_FREED, f'glibc, {ALL}')
