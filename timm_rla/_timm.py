"""All that this package takes from timm's private modules, in one place."""
from timm.models._features import feature_take_indices

__all__ = ['feature_take_indices']
