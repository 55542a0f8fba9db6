"""Loaders for validation."""
import importlib.util
from pathlib import Path

import pytest
import torch
from timm.data import IterableImageDataset

from timm_rla.common.device import Placement
from timm_rla.common.loaders import PADDING_READERS, LoaderSpec, create_eval_loader

CONFIG = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear', crop_pct=1.0)


def reader(name):
    return type(name, (), dict(__len__=lambda self: 4, __iter__=lambda self: iter(())))()


@pytest.mark.parametrize('name, distributed, workers, expected', [
    ('ReaderWds', True, 4, 2),
    ('ReaderTfds', True, 4, 2),
    ('ReaderTfds', True, 1, 1),
    ('ReaderTfds', False, 4, 4),
    ('ReaderHfids', True, 4, 4),
])
def test_workers_of_readers_that_pad(name, distributed, workers, expected):
    """As timm's train.py: no more than two in a distributed validation, where each would pad its share."""
    placement = Placement(torch.device('cpu'), distributed=distributed, world_size=2 if distributed else 1)
    dataset = IterableImageDataset('', reader=reader(name))
    assert create_eval_loader(dataset, LoaderSpec(2, workers), CONFIG, placement).num_workers == expected


@pytest.mark.parametrize('name', PADDING_READERS)
def test_timm_has_such_readers(name):
    module = f'timm.data.readers.reader_{name.removeprefix("Reader").lower()}'
    assert f'class {name}(' in Path(importlib.util.find_spec(module).origin).read_text()
