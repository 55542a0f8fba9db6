"""ResNets for 32 x 32 images, with 6n+2 layers, as timm models: plain, with SE, and with layer attention.

Paper: `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
"""
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType
from timm.models.resnet import BasicBlock, ResNet

from .._timm import feature_take_indices
from .network import RecurrentLayerAttention

__all__ = ['CifarResNet', 'RLACifarResNet']

FIXED = {'stem_type', 'stem_width', 'replace_stem_pool', 'avg_down', 'down_kernel_size'}  # arguments of timm's ResNet


class PaddedShortcut(nn.Module):
    """Shortcut without parameters (option A): subsample, then pad with zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]"""
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class CifarResNet(ResNet):
    """timm's ResNet with the stem, the three stages and the shortcuts of He et al.'s CIFAR networks.

    Args:
        block: Residual block, basic.
        layers: Number of blocks in each of the three stages.
        channels: Planes of each stage, the first an even number.
        output_stride: Total stride, 4 or, with a dilated last stage, 2.
        attn_layer: Intra-layer attention in each block, any name that timm knows.
        zero_init_last: Start each block at zero. Off by default, unlike in timm: He et al. (and the RLA paper) do not.
        block_args: More arguments for each block.
        **kwargs: Further arguments of timm's ResNet, but for `FIXED`.

    Raises:
        ValueError: One of `FIXED`, or a block with a bottleneck.
    """

    def __init__(
            self,
            block: Type[BasicBlock],
            layers: Tuple[int, int, int],
            num_classes: int = 10,
            in_chans: int = 3,
            channels: Tuple[int, int, int] = (16, 32, 64),
            output_stride: int = 4,
            attn_layer: Optional[LayerType] = None,
            zero_init_last: bool = False,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **kwargs,
    ):
        assert output_stride in (2, 4), f'output_stride must be 2 or 4, not {output_stride}'
        assert channels[0] >= 2 and channels[0] % 2 == 0, f'channels must begin with an even number, not {channels[0]}'
        for name in FIXED & kwargs.keys():
            raise ValueError(f'{name} {kwargs[name]}: stem and shortcuts of networks for CIFAR are fixed')
        if block.expansion != 1:
            raise ValueError(f'block {block.__name__}: networks for CIFAR have basic blocks')
        dd = dict(device=device, dtype=dtype)
        block_args = dict(block_args or {})
        if attn_layer is not None:
            block_args.setdefault('attn_layer', attn_layer)
        super().__init__(
            block,
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            channels=channels,
            output_stride=4 * output_stride,  # timm counts the stride of an ImageNet stem
            stem_type='deep',  # the one whose width can be set; its convolutions are replaced below
            stem_width=channels[0] // 2,
            zero_init_last=zero_init_last,
            block_args=block_args,
            **kwargs,
            **dd,
        )
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        widths = [channels[0], *channels]
        for width, stage in zip(widths, (self.layer1, self.layer2, self.layer3)):
            if stage[0].downsample is not None:
                stage[0].downsample = PaddedShortcut(width, stage[0].conv2.out_channels, stage[0].stride)
        for info in self.feature_info:
            info['reduction'] = max(1, info['reduction'] // 4)

        self.init_weights(zero_init_last=zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialize model weights, with the last norm of each residual branch at one unless told otherwise."""
        super().init_weights(zero_init_last=zero_init_last)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates: as timm's ResNet, with four of them."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, take_indices, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if max_index < len(self.feature_info) - 1:
            return super().prune_intermediate_layers(take_indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices


class RLACifarResNet(RecurrentLayerAttention, CifarResNet):
    """Recurrent Layer Attention on a CIFAR ResNet. Takes the arguments of both."""

    def __init__(self, *args: Any, channels: Tuple[int, int, int] = (16, 32, 64), **kwargs: Any):
        super().__init__(*args, channels=channels, **kwargs)
