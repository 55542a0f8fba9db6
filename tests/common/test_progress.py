"""Progress of long work, as a log shows it."""
import logging
import time

import pytest

from timm_rla.common.progress import Progress, show_rate


@pytest.mark.parametrize('images, seconds, shown', [
    (1, 13, '0.0769 img/s'), (10, 2, '5.00 img/s'), (505, 40, '12.6 img/s'), (12345, 10, '1234 img/s'),
])
def test_rate(images, seconds, shown):
    assert show_rate(images, seconds) == shown


def test_lines(monkeypatch, caplog):
    """Every second step of five, with two more steps after them: the rate of all so far, the time that is left."""
    seconds = iter([0, 1, 3, 4, 6, 8])
    monkeypatch.setattr(time, 'perf_counter', lambda: next(seconds))
    with caplog.at_level(logging.INFO), Progress('Train 1/9', total=5, interval=2, later=2) as progress:
        for loss in '12345':
            progress.update(30, loss=loss)
    assert caplog.messages == [
        'Train 1/9 [2/5]  20.0 img/s  0:00:07 left  loss 2',
        'Train 1/9 [4/5]  20.0 img/s  0:00:04 left  loss 4',
    ]


def test_other_processes_are_silent(caplog):
    with caplog.at_level(logging.INFO), Progress('Train', total=1, interval=1, enabled=False) as progress:
        progress.update(30)
    assert not caplog.messages
