"""Faster R-CNN on backbones of this package and of timm (section 4.3)."""
from .faster_rcnn import fasterrcnn

__all__ = ['fasterrcnn']
