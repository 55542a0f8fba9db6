"""All that this package uses of timm's private API, in one place."""
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import save_for_hf

__all__ = ['FeatureGetterNet', 'feature_take_indices', 'save_for_hf']
