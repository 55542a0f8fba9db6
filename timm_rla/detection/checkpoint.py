"""Detectors from checkpoints of `timm-rla detect train`."""
import reprlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torchvision.models.detection import FasterRCNN

from ..common.checkpoint import load_weights, read_checkpoint
from ..common.errors import UserError, one_line
from ..common.files import replacing
from ..common.networks import network_class
from ..common.ranges import RANGES
from ..common.summary import read_summary, trim_summary
from ..common.trained import architecture_arguments, check_sizes, every, is_number, is_text
from .faster_rcnn import NECKS, fasterrcnn

__all__ = [
    'TrainedDetector', 'checkpoints', 'describe', 'find_last', 'go_back', 'is_readable', 'iterations', 'load_detector',
]


@dataclass(frozen=True)
class TrainedDetector:
    """A detector, which knows what makes it anew (`arguments`), and its classes."""
    model: FasterRCNN
    names: List[str]  # of labels 1 to K
    category_ids: List[int]  # of labels 1 to K


def _is_option(name: str) -> Callable[[Any], bool]:
    """What says whether a value is one that the option of this name may have."""
    return lambda value: is_number(value) and RANGES[name].holds(value)


def _is_count(name: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and _is_option(name)(value)


def _few(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: every(check)(value) and 0 < len(value) <= MOST


MOST = 10_000  # classes, anchors
EXPECTED: Dict[str, Callable[[Any], bool]] = {  # of a description
    'backbone': lambda value: is_text(value) and len(value) < 200 and ':' not in value,
    'neck': lambda value: is_text(value) and value in NECKS,
    'frozen_bn': lambda value: isinstance(value, bool),
    'backbone_kwargs': lambda value: isinstance(value, dict),
    'names': _few(is_text),
    'category_ids': _few(lambda value: isinstance(value, int)),
    'anchor_sizes': _few(_is_option('anchor_sizes')),
    'anchor_ratios': _few(_is_option('anchor_ratios')),
    'image_mean': lambda value: value is None or _few(is_number)(value),
    'image_std': lambda value: value is None or _few(is_number)(value),
    'bbox_reg_weights': lambda value: value is None or _few(is_number)(value) and len(value) == 4,
    'min_size': lambda value: _is_option('min_size')(value) or _few(_is_option('min_size'))(value),
    'max_size': _is_option('max_size'),
    **{name: _is_count(name) for name in (
        'roi_size', 'pyramid_channels', 'rpn_pre_nms_top_n_train', 'rpn_pre_nms_top_n_test',
        'rpn_post_nms_top_n_train', 'rpn_post_nms_top_n_test', 'rpn_batch_size_per_image', 'box_detections_per_img',
        'box_batch_size_per_image')},
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


def is_readable(description: Dict[str, Any], key: str) -> bool:
    """True for an entry of a description that `load_detector` takes: of a known name, and in its range."""
    return key in EXPECTED and key in description and EXPECTED[key](description[key])


def describe(checkpoint: Dict[str, Any], source: str) -> Dict[str, Any]:
    """What a checkpoint says of its detector.

    Raises:
        UserError: It is of no detector, or damaged.
    """
    description = checkpoint.get('detector')
    if not isinstance(description, dict):
        raise UserError(f'{source}: not of timm-rla detect train; it has no detector')
    for key in sorted(ALWAYS | description.keys(), key=str):
        if not is_readable(description, key):
            raise UserError(f'{source}: damaged, its detector has {reprlib.repr(key)} '
                            f'{reprlib.repr(description.get(key))}')
    if len(description['names']) != len(description['category_ids']):
        raise UserError(f'{source}: damaged, {len(description["names"])} names of '
                        f'{len(description["category_ids"])} categories')
    return description


def checkpoints(folder: Path) -> List[Path]:
    """Checkpoints of a run, the newest first."""
    return sorted(folder.glob('checkpoint-*.ckpt'), key=_number, reverse=True)


def _number(path: Path) -> int:
    """Iterations in the name of a checkpoint."""
    digits = path.stem.rpartition('-')[2]
    return int(digits) if digits.isdecimal() else -1


def iterations(checkpoint: Dict[str, Any], source: str) -> int:
    """Iterations that a run had behind it when it wrote a checkpoint.

    Raises:
        UserError: It does not say.
    """
    step = checkpoint.get('global_step')
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f'{source}: damaged, its iteration is {reprlib.repr(step)}')
    return step


def go_back(folder: Path, checkpoint: Path, step: int) -> Optional[float]:
    """Bring the folder of a run into the state right behind one of its checkpoints; the mAP of best.ckpt, if it stays.

    What is of later iterations goes, so that --resume auto never goes on with what has been left. best.ckpt is then
    the best of what there still is.

    Args:
        folder: Folder of the run.
        checkpoint: In this folder.
        step: Its iteration.
    """
    last, best = folder / f'checkpoint-{step}.ckpt', folder / 'best.ckpt'
    if not last.exists():  # it has another name, which --resume auto would not find
        _copy(checkpoint, last)
    for path in checkpoints(folder):
        if _number(path) > step and path.resolve() != checkpoint.resolve():
            path.unlink()
    if any(row['epoch'] > step for row in read_summary(folder)):
        (folder / 'metrics.json').unlink(missing_ok=True)
    trim_summary(folder, step + 1)  # the evaluation of that step came before its checkpoint
    scores = {int(row['epoch']): row['eval_map'] for row in read_summary(folder) if 'eval_map' in row}
    step_of_best = -1
    if best.is_file():
        try:
            step_of_best = iterations(read_checkpoint(str(best), '--resume'), '--resume')
        except UserError:  # damaged
            step_of_best = step + 1
    if step_of_best > step:
        best.unlink()
        step_of_best = -1
    if step in scores and (step_of_best == -1 or scores[step] > scores.get(step_of_best, -1)):
        _copy(checkpoint, best)
        step_of_best = step
    return scores.get(step_of_best)


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def find_last(folder: Path) -> Tuple[Optional[Path], Dict[str, Any]]:
    """The newest checkpoint of a run that can be read, and what is in it; None and {} if there is none."""
    for path in checkpoints(folder):
        try:
            return path, read_checkpoint(str(path), '--resume')
        except UserError:
            continue
    return None, {}
