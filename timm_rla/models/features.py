"""Feature extraction, `features_only=True`."""
from typing import Dict, List

import torch

from .._timm import FeatureGetterNet

__all__ = ['StageFeatures']


class StageFeatures(FeatureGetterNet):
    """timm's feature extractor for an RLA network, which TorchScript compiles.

    It has the `return_layers` by which transformers asks a ResNet for all of its stages: names of modules and ids of
    features, which can be set to any stages that pruning has left.
    """
    __jit_unused_properties__ = ['return_layers', 'grad_checkpointing']

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.out_indices = list(self.feature_info.out_indices)
        self._num_features = max(self.out_indices) + 1

    @property
    def return_layers(self) -> Dict[str, str]:
        return {self.feature_info.info[index]['module']: str(index) for index in self.out_indices}

    @return_layers.setter
    def return_layers(self, layers: Dict[str, str]) -> None:
        infos = self.feature_info.info[:self._num_features]
        self.out_indices = [index for index, info in enumerate(infos) if info['module'] in layers]

    @property
    def grad_checkpointing(self) -> bool:
        return self.model.grad_checkpointing

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of each block."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """[B, in_chans, H, W] -> feature maps [B, C, H', W'] of the stem and the stages in `out_indices`"""
        return self.model.run_stages(x, self.out_indices, max(self.out_indices))[2]
