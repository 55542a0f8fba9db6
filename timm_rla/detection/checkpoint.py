"""Detectors from checkpoints of `timm-rla detect train`."""
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import FasterRCNN

from ..common.checkpoint import load_weights, read_checkpoint
from ..common.errors import UserError, one_line
from ..common.networks import network_class
from ..common.trained import architecture_arguments, check_sizes, every, is_count, is_number, is_text
from .faster_rcnn import NECKS, fasterrcnn

__all__ = ['TrainedDetector', 'checkpoints', 'describe', 'find_last', 'load_detector']


@dataclass(frozen=True)
class TrainedDetector:
    """A detector, which knows what makes it anew (`arguments`), and its classes."""
    model: FasterRCNN
    names: List[str]  # of labels 1 to K
    category_ids: List[int]  # of labels 1 to K


def _is_size(value: Any) -> bool:
    return is_number(value) and 0 < value <= LARGEST


def _few(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: every(check)(value) and 0 < len(value) <= MOST


LARGEST = 10_000  # sizes of images and boxes in pixels
MOST = 10_000  # classes, anchors
EXPECTED: Dict[str, Callable[[Any], bool]] = {  # of a description
    'backbone': lambda value: is_text(value) and len(value) < 200 and ':' not in value,
    'neck': lambda value: is_text(value) and value in NECKS,
    'frozen_bn': lambda value: isinstance(value, bool),
    'backbone_kwargs': lambda value: isinstance(value, dict),
    'names': _few(is_text),
    'category_ids': _few(lambda value: isinstance(value, int)),
    'anchor_sizes': _few(_is_size),
    'anchor_ratios': _few(_is_size),
    'image_mean': _few(is_number),
    'image_std': _few(is_number),
    'min_size': lambda value: _is_size(value) or _few(_is_size)(value),
    'max_size': _is_size,
    'roi_size': lambda value: is_count(value) and value < 1000,
    **dict.fromkeys((
        'pyramid_channels', 'rpn_pre_nms_top_n_train', 'rpn_pre_nms_top_n_test', 'rpn_post_nms_top_n_train',
        'rpn_post_nms_top_n_test', 'rpn_batch_size_per_image', 'box_detections_per_img', 'box_batch_size_per_image',
    ), is_count),
    **dict.fromkeys((
        'rpn_nms_thresh', 'rpn_fg_iou_thresh', 'rpn_bg_iou_thresh', 'rpn_score_thresh', 'rpn_positive_fraction',
        'box_score_thresh', 'box_nms_thresh', 'box_fg_iou_thresh', 'box_bg_iou_thresh', 'box_positive_fraction',
    ), is_number),
}
NOT_OF_THE_MODEL = {'names', 'category_ids'}
ALWAYS = {'backbone', 'neck', *NOT_OF_THE_MODEL}  # others have defaults


def load_detector(path: str, option: str = '--checkpoint', device: str = 'cpu', **kwargs: Any) -> TrainedDetector:
    """A detector in evaluation mode.

    Args:
        path: Checkpoint of `timm-rla detect train`.
        option: Option that named it.
        device: Where it goes.
        **kwargs: Other values for arguments of `fasterrcnn`, such as `box_score_thresh`.

    Raises:
        UserError: The file is no such checkpoint, or damaged.
    """
    source = f'{option} {path}'
    checkpoint = read_checkpoint(path, option)
    description = describe(checkpoint, source)
    weights = {
        key.removeprefix('detector.'): value for key, value in checkpoint['state_dict'].items()
        if key.startswith('detector.')
    }
    network = network_class(description['backbone'])
    given = architecture_arguments(description.get('backbone_kwargs', {}), network, source)
    check_sizes(given, weights, source)
    arguments = {key: value for key, value in description.items() if key not in NOT_OF_THE_MODEL}
    arguments.update(backbone_kwargs=given, num_classes=len(description['names']) + 1, **kwargs)
    try:
        with torch.device('meta'):  # no memory before it is known that the weights fit
            load_weights(fasterrcnn(**arguments), dict(state_dict=weights), source, assign=True)
        model = fasterrcnn(**arguments)
    except (ValueError, TypeError, AssertionError, RuntimeError, LookupError) as e:
        raise UserError(f'{source}: damaged, {one_line(e)}') from e
    load_weights(model, dict(state_dict=weights), source)
    return TrainedDetector(model.to(device).eval(), list(description['names']), list(description['category_ids']))


def describe(checkpoint: Dict[str, Any], source: str) -> Dict[str, Any]:
    """What a checkpoint says of its detector.

    Raises:
        UserError: It is of no detector, or damaged.
    """
    description = checkpoint.get('detector')
    if not isinstance(description, dict):
        raise UserError(f'{source}: not of timm-rla detect train; it has no detector')
    for key in ALWAYS | description.keys():
        if key not in EXPECTED or key not in description or not EXPECTED[key](description[key]):
            raise UserError(f'{source}: damaged, its detector has {reprlib.repr(key)} '
                            f'{reprlib.repr(description.get(key))}')
    if len(description['names']) != len(description['category_ids']):
        raise UserError(f'{source}: damaged, {len(description["names"])} names of '
                        f'{len(description["category_ids"])} categories')
    return description


def checkpoints(folder: Path) -> List[Path]:
    """Checkpoints of a run, the newest first."""
    def iterations(path: Path) -> int:
        digits = path.stem.rpartition('-')[2]
        return int(digits) if digits.isdecimal() else -1

    return sorted(folder.glob('checkpoint-*.ckpt'), key=iterations, reverse=True)


def find_last(folder: Path) -> Tuple[Optional[Path], Dict[str, Any]]:
    """The newest checkpoint of a run that can be read, and what is in it; None and {} if there is none."""
    for path in checkpoints(folder):
        try:
            return path, read_checkpoint(str(path), '--resume')
        except UserError:
            continue
    return None, {}
