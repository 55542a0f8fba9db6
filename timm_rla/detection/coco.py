"""Annotations in the format of COCO, read as what they are or refused: images, boxes and categories of a split."""
import json
import logging
import os
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torchvision.ops import box_convert, clip_boxes_to_image

from ..common.errors import UserError, blame

__all__ = [
    'CocoSplit', 'ImageEntry', 'LAYOUTS', 'Layout', 'describe_split', 'find_layout', 'read_folder', 'read_split',
    'training_boxes',
]

LARGEST = 1e9  # pixels; of what is larger, float32 would not even know the sides
_logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Where a data set has its parts, below its folder."""
    annotations: str  # {} stands for the name of the split
    images: str
    train: str = 'train'
    val: str = 'val'

    def paths(self, root: Path, split: str) -> Tuple[Path, Path]:
        """File of annotations and folder of images."""
        return root / self.annotations.format(split), root / self.images.format(split)


LAYOUTS = {
    'coco2017': Layout('annotations/instances_{}2017.json', '{}2017'),
    'coco2014': Layout('annotations/instances_{}2014.json', '{}2014'),
    'folder': Layout('annotations/{}.json', 'images'),
    'folders': Layout('annotations/{}.json', '{}'),
    'roboflow': Layout('{}/_annotations.coco.json', '{}', val='valid'),
}


def find_layout(root: Path) -> str:
    """Name of the layout that a folder has.

    Raises:
        UserError: None of those that are known.
    """
    if not root.is_dir():
        raise UserError(f'--data-dir {root}: no such folder')
    for name, layout in LAYOUTS.items():
        if all(path.exists() for path in layout.paths(root, layout.val)):
            return name
    known = '; '.join(f'{name}: {layout.annotations.format("SPLIT")}, {layout.images.format("SPLIT")}/'
                      for name, layout in LAYOUTS.items())
    raise UserError(f'--data-dir {root}: no data set in the format of COCO; known are {known}')


@dataclass(frozen=True)
class ImageEntry:
    """An image and what is annotated in it; rows of the tensors are boxes."""
    id: int
    path: Path
    width: int
    height: int
    boxes: torch.Tensor  # [K, 4] as (x, y, width, height) in pixels, as in the file, float64
    labels: torch.Tensor  # [K], from 1 on
    crowd: torch.Tensor  # [K], bool: a group of objects, neither to be learned nor to be missed
    area: torch.Tensor  # [K] in square pixels, of the object where the file tells it, float64


@dataclass(frozen=True)
class CocoSplit:
    """Images of a split. Labels are 1 to K, in the order of the ids of categories."""
    images: List[ImageEntry]
    names: List[str]  # of labels 1 to K
    category_ids: List[int]  # of labels 1 to K


def read_folder(root: Union[str, Path]) -> Tuple[CocoSplit, CocoSplit]:
    """Read training and validation images of a data set in the format of COCO.

    Args:
        root: Its folder, in one of `LAYOUTS`.

    Raises:
        UserError: In none of them, or as for `read_split`.
    """
    layout = LAYOUTS[find_layout(Path(root))]
    train, val = (read_split(*layout.paths(Path(root), split), '--data-dir') for split in (layout.train, layout.val))
    return train, val


def read_split(annotations: Path, images: Path, option: str, skip_missing: bool = False) -> CocoSplit:
    """Read a split.

    Args:
        annotations: JSON file in the format of COCO, for object detection.
        images: Folder of its images.
        option: What named them, for messages.
        skip_missing: Leave out images that are not there, and say how many.

    Raises:
        UserError: Not such a file, no folder of images, an image that is not there, an id that occurs twice, or
            no object that can be learned or found.
    """
    source = f'{option} {annotations}'
    if not images.is_dir():
        raise UserError(f'{option}: no folder of images {images}')
    with blame(source, OSError, UnicodeDecodeError, RecursionError, ValueError, MemoryError):
        content = json.loads(annotations.read_text(encoding='utf-8'))
    _check_lists(content, source)
    category_ids, names = _categories(content['categories'], source)
    labels = {category: label for label, category in enumerate(category_ids, start=1)}
    by_image = _by_image(content['annotations'], labels, _unique_ids(content['images'], 'image', source), source)
    entries = [_entry(image, images, by_image[image['id']], source) for image in content['images']]

    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        text = f'{source}: {len(missing)} of {len(entries)} images are missing, first {missing[0]}'
        if not skip_missing or len(missing) == len(entries):
            raise UserError(f'{text}; --skip-missing leaves them out' if len(missing) < len(entries) else text)
        _logger.warning(f'{text}: left out')
        left_out = set(missing)
        entries = [entry for entry in entries if entry.path not in left_out]
    if not any(len(entry.labels) for entry in entries):
        raise UserError(f'{source}: no object in any of its {len(entries)} images')
    if not any(len(training_boxes(entry)[1]) for entry in entries):
        raise UserError(f'{source}: no object that can be learned or found: all '
                        f'{sum(len(entry.labels) for entry in entries)} are crowds, or without area inside the image')
    return CocoSplit(entries, names, category_ids)


def training_boxes(entry: ImageEntry) -> Tuple[torch.Tensor, torch.Tensor]:
    """What is learned of an image: boxes [K, 4] as (x1, y1, x2, y2), the part in the image, and labels [K].

    Crowds and boxes without area are left out.
    """
    boxes = clip_boxes_to_image(box_convert(entry.boxes, 'xywh', 'xyxy'), (entry.height, entry.width)).float()
    keep = ~entry.crowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[keep], entry.labels[keep]


def _check_lists(content: Any, source: str) -> None:
    for key in ('images', 'annotations', 'categories'):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f'{source}: not in the format of COCO: no list {key!r}')


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high  # never for nan


def _unique_ids(entries: List[Dict[str, Any]], kind: str, source: str) -> List[int]:
    ids = [entry.get('id') for entry in entries]
    for value in ids:
        if not _is_id(value):
            raise UserError(f'{source}: {kind} with id {reprlib.repr(value)}, which must be an integer')
    value, count = max(Counter(ids).items(), key=lambda item: item[1], default=(None, 0))
    if count > 1:
        raise UserError(f'{source}: {kind} id {value} occurs {count} times')
    return ids


def _categories(categories: List[Dict[str, Any]], source: str) -> Tuple[List[int], List[str]]:
    ids = _unique_ids(categories, 'category', source)
    names = [category.get('name') for category in categories]
    for category, name in zip(ids, names):
        if not isinstance(name, str):
            raise UserError(f'{source}: category {category} has the name {reprlib.repr(name)}, which must be a text')
    if not ids:
        raise UserError(f'{source}: no categories')
    # Some tools name the category above all others as one of these: results go by name, and would be of one of them
    counts = Counter(names)
    twice = {name for name in names if counts[name] > 1}
    if twice:
        _logger.warning(f'{source}: categories of the same name get their ids behind it: '
                        f'{reprlib.repr(sorted(twice))}')
    order = sorted((number, f'{name} ({number})' if name in twice else name) for number, name in zip(ids, names))
    return [category for category, _ in order], [name for _, name in order]


def _by_image(
        annotations: List[Dict[str, Any]],
        labels: Dict[int, int],
        image_ids: List[int],
        source: str,
) -> Dict[int, List[Tuple[List[float], int, bool, float]]]:
    """Box, label, crowd and area of each object, by the id of its image."""
    _unique_ids(annotations, 'annotation', source)
    found: Dict[int, List[Tuple[List[float], int, bool, float]]] = {image: [] for image in image_ids}
    for annotation in annotations:
        what = f'{source}: annotation {annotation["id"]}'
        box, image, category = (annotation.get(key) for key in ('bbox', 'image_id', 'category_id'))
        if not _is_id(image) or image not in found:
            raise UserError(f'{what} is of image {reprlib.repr(image)}, which is not there')
        if not _is_id(category) or category not in labels:
            raise UserError(f'{what} is of category {reprlib.repr(category)}; there are '
                            f'{reprlib.repr(sorted(labels))}')
        if not isinstance(box, list) or len(box) != 4 or not all(
                _is_number(value, low, LARGEST) for value, low in zip(box, (-LARGEST, -LARGEST, 0, 0))):
            raise UserError(f'{what} has the box {reprlib.repr(box)}, which must be x, y, width, height, '
                            'the last two not below 0')
        area = annotation.get('area')
        found[image].append((
            [float(value) for value in box], labels[category], bool(annotation.get('iscrowd', 0)),
            float(area) if _is_number(area, 0, LARGEST ** 2) and area else float(box[2] * box[3])))
    return found


def _entry(
        image: Dict[str, Any],
        folder: Path,
        objects: List[Tuple[List[float], int, bool, float]],
        source: str,
) -> ImageEntry:
    what = f'{source}: image {image["id"]}'
    name = image.get('file_name')
    if not isinstance(name, str) or not 0 < len(name) < 1000:
        raise UserError(f'{what} has the file name {reprlib.repr(name)}')
    if not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder)):
        raise UserError(f'{what} has the file name {reprlib.repr(name)}, outside of the folder of images {folder}')
    for key in ('width', 'height'):
        if not _is_id(image.get(key)) or not 1 <= image[key] <= LARGEST:
            raise UserError(f'{what} has {key} {reprlib.repr(image.get(key))}, which must be a number of pixels')
    boxes, labels, crowd, area = zip(*objects) if objects else ([], [], [], [])
    return ImageEntry(
        image['id'],
        folder / name,
        image['width'],
        image['height'],
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(crowd, dtype=torch.bool),
        torch.tensor(area, dtype=torch.float64),
    )


def describe_split(name: str, split: CocoSplit, left_out: Optional[int] = None) -> str:
    """One line about the images of a split.

    Args:
        name: Of the split.
        split: What was read.
        left_out: Boxes that are not trained on.
    """
    objects = sum(len(entry.labels) for entry in split.images)
    empty = sum(not len(entry.labels) for entry in split.images)
    shown = ', '.join(split.names[:5]) + (', ...' if len(split.names) > 5 else '')
    parts = [f'{len(split.images):,} images', f'{objects:,} objects of {len(split.names)} classes ({shown})']
    if empty:
        parts.append(f'{empty} images without objects')
    if left_out:
        parts.append(f'{left_out} boxes not trained on: crowds, or without area inside the image')
    return f'{name}: ' + ', '.join(parts)
