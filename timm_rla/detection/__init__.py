"""Faster R-CNN on backbones of this package and of timm (section 4.3)."""
import importlib
from typing import Any

from .coco import read_folder
from .faster_rcnn import fasterrcnn
from .schedule import Schedule

__all__ = ['Detection', 'DetectionData', 'Schedule', 'fasterrcnn', 'read_folder']

OF_LIGHTNING = {'Detection': 'module', 'DetectionData': 'data'}  # imported when they are asked for


def __getattr__(name: str) -> Any:
    if name not in OF_LIGHTNING:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{OF_LIGHTNING[name]}'), name)
