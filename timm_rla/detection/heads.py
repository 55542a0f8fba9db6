"""torchvision's anchors and heads, with boxes in float32 whatever the features are in.

torchvision computes boxes in the type of the features. Under mixed precision that is too coarse: in bfloat16
coordinates from 256 pixels on come in steps of 2, boxes of training lose their width, and the loss becomes NaN.
"""
from typing import List, Tuple

import torch
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead

__all__ = ['Anchors', 'BoxPredictor', 'ProposalHead']


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Anchors(AnchorGenerator):
    """Anchors in float32, or in float64 with such features."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the anchors of one place, a list of [A, 4] for each level; torchvision rounds them for good."""
        dtype = torch.promote_types(dtype, torch.float32)
        self.cell_anchors = [anchors.to(dtype=dtype, device=device) for anchors in self.cell_anchors]


class ProposalHead(RPNHead):
    """Head of the region proposal network."""

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """[[B, C, H, W], ...] -> for each level objectness [B, A, H, W] and box deltas [B, 4A, H, W]"""
        return self.of_maps(x)

    def of_maps(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """What `forward` does, for those who inherit: TorchScript has no super()."""
        objectness, deltas = [], []
        for features in x:
            t = self.conv(features)
            objectness.append(_at_least_float32(self.cls_logits(t)))
            deltas.append(_at_least_float32(self.bbox_pred(t)))
        return objectness, deltas


class BoxPredictor(FastRCNNPredictor):
    """Class and box of each region."""

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """[R, C] -> class logits [R, K] and box deltas [R, 4K]"""
        return _at_least_float32(self.cls_score(x)), _at_least_float32(self.bbox_pred(x))
