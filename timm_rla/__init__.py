"""Recurrent Layer Attention networks as a timm plugin: `import timm_rla`, then `timm.create_model('rla_resnet50')`."""
from . import models as models
from .version import __version__ as __version__
