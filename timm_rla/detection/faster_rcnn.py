"""Faster R-CNN of torchvision's parts on a backbone of this package or of timm.

Paper of the detector: `Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks` -
https://arxiv.org/abs/1506.01497
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import timm
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d
from timm.models import FeatureInfo
from timm.models.resnet import ResNet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from ..common.checkpoint import read_checkpoint
from ..common.errors import closest
from ..models.network import RecurrentLayerAttention
from .backbone import PyramidBackbone, create_network, freeze_stages, trained_with
from .c4 import FirstMapHead, MeanOfRegion, c4_anchors, c4_parts
from .heads import Anchors, BoxPredictor, ProposalHead

__all__ = ['NECKS', 'fasterrcnn']

HIDDEN = 1024  # features of a region behind the pyramid, as in torchvision


def fasterrcnn(
        backbone: str = 'rla_resnet50',
        num_classes: int = 91,
        neck: str = 'fpn',
        pretrained: Union[bool, str] = False,
        trainable_layers: Optional[int] = None,
        frozen_bn: bool = True,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        anchor_sizes: Tuple[int, ...] = (32, 64, 128, 256, 512),
        anchor_ratios: Tuple[float, ...] = (0.5, 1.0, 2.0),
        roi_size: int = 7,
        pyramid_channels: int = 256,
        **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN, called as any detection model of torchvision.

    In training mode it takes a list of images [3, H, W] with values in [0, 1] and a list of targets, `boxes` [K, 4] as
    (x1, y1, x2, y2) in pixels and `labels` [K] in 1 to num_classes - 1, and returns a dict of losses. In evaluation it
    returns for each image `boxes`, `labels` and `scores`.

    Args:
        backbone: Name of a network of timm: with 'fpn' any whose last stages have strides 4, 8, 16 and 32, with 'c4' a
            ResNet (plain, SE, with layer attention, ...).
        num_classes: Classes, with the background as class 0.
        neck: 'fpn', a feature pyramid (https://arxiv.org/abs/1612.03144), or 'c4', which runs the last stage on each
            region of the feature map of stride 16. With layer attention the last stage goes on from the recurrent state
            of the region's own image.
        pretrained: Weights of the backbone: True for those that timm hosts (for layer attention a warm start from
            them), a file for those of a checkpoint of classification, with the arguments of its network and its
            mean and standard deviation of images, False for random ones.
        trainable_layers: Number of stages of the backbone that are trained, from the last one: 0 to 5, 5 with the
            stem; 3 if None, or 5 with random weights, as in torchvision.
        frozen_bn: Let the batch norms of the backbone be constants. With random weights set it to False.
        backbone_kwargs: Further arguments of the backbone.
        anchor_sizes: Square roots of the areas of anchors in pixels: five, one for each level of the pyramid, or any
            number for 'c4'.
        anchor_ratios: Height / width of anchors.
        roi_size: Height and width of the features of a region.
        pyramid_channels: Channels of the feature pyramid.
        **kwargs: Arguments of torchvision's `FasterRCNN`, such as `min_size`, `box_score_thresh` or
            `rpn_batch_size_per_image`.

    Returns:
        torchvision's detector; its `arguments` are those above that make it anew.

    Raises:
        ValueError: Unknown network or neck, a network without the strides, or a number out of range.
        UserError: `pretrained` is no checkpoint.
    """
    if neck not in NECKS:
        raise ValueError(f'neck {neck!r}: must be one of {", ".join(NECKS)}')
    if not timm.is_model(backbone):
        raise ValueError(f'backbone {backbone!r}: no such model; {closest(backbone, timm.list_models())}')
    if num_classes < 2:
        raise ValueError(f'num_classes {num_classes}: must be at least 2, the background and one more')
    if trainable_layers is None:
        trainable_layers = 3 if pretrained else 5
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f'trainable_layers {trainable_layers}: must be from 0 to 5')
    kind = NECKS[neck]
    checkpoint = None
    if isinstance(pretrained, str):
        checkpoint = read_checkpoint(pretrained, 'pretrained')
        trained_kwargs, mean_and_std = trained_with(checkpoint, f'pretrained {pretrained}', backbone)
        backbone_kwargs, kwargs = {**trained_kwargs, **(backbone_kwargs or {})}, {**mean_and_std, **kwargs}
    if (backbone_kwargs or {}).get('in_chans', 3) != 3:
        raise ValueError(f'backbone_kwargs in_chans={backbone_kwargs["in_chans"]}: must be 3, images are in colour')
    try:
        network = create_network(backbone, pretrained, checkpoint, **kind.network, **(backbone_kwargs or {}))
    except (AssertionError, AttributeError, TypeError) as e:  # an argument that this network does not take
        given = ''.join(f' {key}={value}' for key, value in (backbone_kwargs or {}).items())
        raise ValueError(f'backbone {backbone!r} with neck {neck!r}{given}: {e}') from e
    stages = _stages(network)
    strides = tuple(stage['reduction'] for stage in stages)
    if strides != kind.strides or not isinstance(network, kind.type):
        raise ValueError(f'backbone {backbone!r}: neck {neck!r} takes {kind.takes}')
    freeze_stages(network, [stage['module'] for stage in stages], trainable_layers)
    if frozen_bn:
        network = freeze_batch_norm_2d(network)
    mean_and_std = {f'image_{key}': network.pretrained_cfg[key] for key in ('mean', 'std')}
    parts = Parts(num_classes, anchor_sizes, anchor_ratios, roi_size, pyramid_channels)
    model = kind.build(network, parts, **{**mean_and_std, **kwargs})
    model.arguments = dict(  # what makes it anew but for the classes: checkpoints have it
        backbone=backbone, neck=neck, frozen_bn=frozen_bn, backbone_kwargs=dict(backbone_kwargs or {}),
        anchor_sizes=anchor_sizes, anchor_ratios=anchor_ratios, roi_size=roi_size, pyramid_channels=pyramid_channels,
        **kwargs)
    return model


class Parts(NamedTuple):
    """What a detector has beside its network; as the arguments of `fasterrcnn`."""
    num_classes: int
    anchor_sizes: Tuple[int, ...]
    anchor_ratios: Tuple[float, ...]
    roi_size: int
    pyramid_channels: int  # of 'fpn' alone


def _stages(network: nn.Module) -> List[Dict[str, Any]]:
    """timm's description of the last four stages of a network, or of features made of one."""
    info = network.feature_info
    return (info.get_dicts() if isinstance(info, FeatureInfo) else list(info))[-4:]


def _with_pyramid(network: nn.Module, parts: Parts, **kwargs: Any) -> FasterRCNN:
    sizes = parts.anchor_sizes
    if len(sizes) != 5:
        raise ValueError(f'anchor_sizes {sizes}: must be five, one for each level of the pyramid')
    anchors = Anchors(tuple((size,) for size in sizes), (parts.anchor_ratios,) * 5)
    return FasterRCNN(
        PyramidBackbone(network, parts.pyramid_channels),
        rpn_anchor_generator=anchors,
        rpn_head=ProposalHead(parts.pyramid_channels, len(parts.anchor_ratios)),
        box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], parts.roi_size, sampling_ratio=2),
        box_head=TwoMLPHead(parts.pyramid_channels * parts.roi_size ** 2, HIDDEN),
        box_predictor=BoxPredictor(HIDDEN, parts.num_classes),
        **kwargs,
    )


def _with_c4(network: nn.Module, parts: Parts, **kwargs: Any) -> FasterRCNN:
    recurrent = isinstance(network, RecurrentLayerAttention)
    features = network.num_features
    backbone, on_regions = c4_parts(network)
    anchors = c4_anchors(recurrent, parts.anchor_sizes, parts.anchor_ratios)
    head = FirstMapHead if recurrent else ProposalHead
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=head(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        box_roi_pool=MultiScaleRoIAlign(['0'], parts.roi_size, sampling_ratio=2),
        box_head=MeanOfRegion(),
        box_predictor=BoxPredictor(features, parts.num_classes),
        **kwargs,
    )
    model.roi_heads.box_roi_pool = on_regions(model.roi_heads.box_roi_pool)
    return model


class Neck(NamedTuple):
    """How a detector is made of a network."""
    network: Dict[str, Any]  # arguments of timm's `create_model`
    type: Type[nn.Module]  # of what it returns
    strides: Tuple[int, ...]  # of its last stages
    takes: str  # the same in words
    build: Callable[..., FasterRCNN]


NECKS = {
    'fpn': Neck(
        dict(features_only=True, out_indices=(-4, -3, -2, -1)), nn.Module, (4, 8, 16, 32),
        'networks with stages of strides 4, 8, 16 and 32', _with_pyramid),
    'c4': Neck(
        dict(num_classes=0, output_stride=16), ResNet, (4, 8, 16, 16),
        'ResNets of timm and of this package with stages of strides 4, 8, 16 and 32', _with_c4),
}
