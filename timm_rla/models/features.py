"""Feature extraction, `features_only=True`."""
from typing import Dict

from .._timm import FeatureGetterNet

__all__ = ['StageFeatures']


class StageFeatures(FeatureGetterNet):
    """timm's feature extractor, with the `return_layers` by which transformers asks a ResNet for all of its stages.

    They are names of modules and ids of features, and can be set to any stages that pruning has left.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.out_indices = list(self.feature_info.out_indices)
        self._num_layers = max(self.out_indices) + 1

    @property
    def return_layers(self) -> Dict[str, str]:
        return {self.feature_info.info[index]['module']: str(index) for index in self.out_indices}

    @return_layers.setter
    def return_layers(self, layers: Dict[str, str]) -> None:
        infos = self.feature_info.info[:self._num_layers]
        self.out_indices = [index for index, info in enumerate(infos) if info['module'] in layers]
