"""Recurrent Layer Attention networks as a timm plugin: `import timm_rla`, then `timm.create_model('rla_resnet50')`."""
from typing import Any

from . import models as models
from .version import __version__ as __version__


def __getattr__(name: str) -> Any:
    """`timm_rla.freeze_attention`, imported when it is asked for: timm takes this package along at its own import."""
    if name == 'freeze_attention':
        from .analysis.frozen import freeze_attention
        return freeze_attention
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
