"""In which precision a model runs."""
import logging
import platform
from pathlib import Path

import pytest

from timm_rla._torch import has_bfloat16
from timm_rla.common import device

CPUINFO = Path('/proc/cpuinfo')


@pytest.mark.parametrize('asked, on, fast, used, words', [
    ('float16', 'cuda', False, 'float16', ''),
    ('bfloat16', 'cuda:1', False, 'bfloat16', ''),
    ('float16', 'cpu', True, 'bfloat16', 'in bfloat16'),
    ('bfloat16', 'cpu', True, 'bfloat16', ''),
    ('bfloat16', 'cpu', False, 'bfloat16', 'without --amp it is many times faster'),
])
def test_mixed_precision(monkeypatch, caplog, asked, on, fast, used, words):
    monkeypatch.setattr(device, 'has_bfloat16', lambda: fast)
    with caplog.at_level(logging.INFO):
        assert device.mixed_precision(asked, on) == used
    assert len(caplog.messages) == bool(words) and words in caplog.text


@pytest.mark.skipif(platform.machine() != 'x86_64' or not CPUINFO.is_file(), reason='reads the flags of an x86 CPU')
def test_bfloat16_of_this_cpu():
    flags = CPUINFO.read_text().split('flags', 1)[1].splitlines()[0].split()
    assert has_bfloat16() == bool({'avx512bw', 'avx_ne_convert'} & set(flags))
