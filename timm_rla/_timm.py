"""All that this package uses of timm's private API, in one place."""
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_path, save_for_hf

__all__ = ['FeatureGetterNet', 'feature_take_indices', 'load_model_config_from_path', 'save_for_hf']
