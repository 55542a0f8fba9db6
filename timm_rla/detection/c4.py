"""The C4 detector of a ResNet: the last stage runs on each region of the feature map of stride 16.

The recurrent state enters the last stage with the image that a region is of. torchvision passes between backbone and
heads only named maps, so the state travels as a map of one pixel, [B, 2M, 1, 1], on which there are no anchors. For
each region one row of it is taken, 2M numbers; no feature map is copied.
"""
from collections import OrderedDict
from typing import Callable, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.models import FeatureListNet
from timm.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign

from ..models.network import RecurrentLayerAttention
from ..ops.lstm import CellWeights, step_function
from .heads import Anchors, ProposalHead

__all__ = ['FirstMapHead', 'MeanOfRegion', 'c4_anchors', 'c4_parts']


class C4Backbone(nn.Module):
    """A ResNet up to its stage of stride 16.

    Args:
        body: What returns the feature map of that stage, in a list.
        out_channels: Its channels.
    """

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        self.body = body
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {'0': [B, C, H / 16, W / 16]}"""
        return OrderedDict([('0', self.body(x)[0])])


class RecurrentC4Backbone(nn.Module):
    """A network with layer attention up to its stage of stride 16.

    Args:
        body: The network, its last stage pruned.
        out_channels: Channels of the feature map.
    """

    def __init__(self, body: RecurrentLayerAttention, out_channels: int):
        super().__init__()
        self.body = body
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """[B, 3, H, W] -> {'0': [B, C, H / 16, W / 16], 'state': h and c of its last block [B, 2M, 1, 1]}"""
        x, state, _ = self.body.run_stages(x, take=[], last=3)
        assert state is not None
        return OrderedDict([('0', x), ('state', torch.cat(state, 1)[:, :, None, None])])


class RegionStage(nn.Module):
    """RoIAlign and the last stage of a ResNet.

    Args:
        pool: RoIAlign on the feature map.
        stage: The stage.
    """

    def __init__(self, pool: MultiScaleRoIAlign, stage: nn.Module):
        super().__init__()
        self.pool = pool
        self.stage = stage

    def forward(
            self,
            maps: Dict[str, torch.Tensor],
            boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> torch.Tensor:
        """Maps by name, boxes [R_i, 4] and size of each image -> [R, C, 7, 7] for all R regions"""
        return self.stage(self.pool(maps, boxes, image_shapes))


class RecurrentRegionStage(nn.Module):
    """RoIAlign and the last stage of a network with layer attention, with the state of each region's image.

    Args:
        pool: RoIAlign on the feature map.
        stage: The stage.
        lstm: The cell, which the backbone shares.
    """

    def __init__(self, pool: MultiScaleRoIAlign, stage: nn.Module, lstm: nn.LSTMCell):
        super().__init__()
        self.pool = pool
        self.stage = stage
        self.lstm = lstm

    def forward(
            self,
            maps: Dict[str, torch.Tensor],
            boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> torch.Tensor:
        """Maps by name, boxes [R_i, 4] and size of each image -> [R, C, 7, 7] for all R regions"""
        image = torch.cat([torch.full_like(b[:, 0], i, dtype=torch.int64) for i, b in enumerate(boxes)])  # [R]
        h, c = maps['state'].flatten(1)[image].chunk(2, 1)  # [R, M] each
        x, _ = self.stage(self.pool(maps, boxes, image_shapes), (h, c), self.step())
        return x

    def step(self) -> CellWeights:
        """The LSTM for one forward pass."""
        if not torch.jit.is_scripting():
            return step_function(self.lstm)
        return CellWeights(self.lstm.weight_ih, self.lstm.weight_hh, self.lstm.bias_ih + self.lstm.bias_hh)


class MeanOfRegion(nn.Module):
    """What the boxes are predicted from: the mean over a region."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[R, C, H, W] -> [R, C]"""
        return x.mean((2, 3))


class FirstMapHead(ProposalHead):
    """Head of the region proposal network for the feature map, and not for the state that comes with it."""

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """[[B, C, H, W], state] -> objectness [[B, A, H, W]], box deltas [[B, 4A, H, W]]"""
        return self.of_maps(x[:1])


def c4_anchors(recurrent: bool, sizes: Tuple[int, ...], aspect_ratios: Tuple[float, ...]) -> Anchors:
    """Anchors on the feature map, none on the state.

    Args:
        recurrent: The backbone returns a state.
        sizes: Square roots of their areas in pixels.
        aspect_ratios: Height / width.
    """
    return Anchors((sizes, ()) if recurrent else (sizes,), (aspect_ratios,) * (2 if recurrent else 1))


def c4_parts(network: ResNet) -> Tuple[nn.Module, Callable[[MultiScaleRoIAlign], nn.Module]]:
    """A ResNet as backbone and as what runs on regions.

    Args:
        network: Made with `output_stride=16`: its last stage keeps the size of a region.

    Returns:
        Backbone and, from RoIAlign, what makes of it the module that runs on regions.
    """
    channels = network.feature_info[3]['num_chs']
    stage = network.layer4
    _take_out_dilation(stage)
    if isinstance(network, RecurrentLayerAttention):
        network.prune_intermediate_layers([3])
        return RecurrentC4Backbone(network, channels), lambda pool: RecurrentRegionStage(pool, stage, network.lstm)
    return C4Backbone(FeatureListNet(network, out_indices=(3,)), channels), lambda pool: RegionStage(pool, stage)


def _take_out_dilation(stage: nn.Module) -> None:
    """Undo what timm does to a stage without stride: of a region of 7x7 pixels a dilated kernel mostly lies outside."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = (1, 1)
            module.padding = tuple(size // 2 for size in module.kernel_size)
