"""Datasets: timm's own, with every sample checked."""
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from PIL import Image
from timm.data import ImageDataset, create_dataset

from .errors import UserError, blame

__all__ = ['DataSource', 'StrictImageDataset', 'check_same_classes', 'class_indices', 'open_dataset']

SPLIT_SYNONYMS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'eval', 'evaluation')}


@dataclass(frozen=True)
class DataSource:
    """Where a dataset is and how it is read, in the terms of timm's `create_dataset`."""
    data_dir: Optional[str] = None
    dataset: str = ''  # type and name, image folder if empty
    class_map: str = ''
    download: bool = False
    input_img_mode: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    trust_remote_code: bool = False

    @property
    def option(self) -> str:
        """The option that names it, for messages."""
        return f'--dataset {self.dataset}' if self.dataset else f'--data-dir {self.data_dir}'


class StrictImageDataset(ImageDataset):
    """timm's ImageDataset, where an image that cannot be read is an error that names it, not one that is skipped."""

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        try:
            file, target = self.reader[index]
            image = Image.open(file)
            image = image.convert(self.input_img_mode) if self.input_img_mode else image
        except Exception as e:  # PIL raises whatever its decoders raise
            raise UserError(f'cannot read image {self.filename(index, absolute=True)}: {e}') from e
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


def open_dataset(
        source: DataSource,
        split: str,
        in_chans: int = 3,
        num_classes: Optional[int] = None,
        num_samples: Optional[int] = None,
        batch_size: int = 1,
        need_split: bool = False,
        **kwargs: Any,
) -> Any:
    """Open one split of a dataset.

    Args:
        source: Where it is.
        split: Name of the split.
        in_chans: Channels that images are converted to, if `source` names no mode.
        num_classes: Classes of the model, not checked if None.
        num_samples: Samples in an iterable split.
        batch_size: Images in a batch, which iterable datasets take into account.
        need_split: An image folder must hold its splits; timm takes the root for each if it does not.
        **kwargs: Further arguments of timm's `create_dataset`.

    Raises:
        UserError: Missing or empty folder, unknown dataset, or more classes than the model has.
    """
    if not source.dataset:
        _check_folder(source.data_dir, split, need_split)
    with blame(source.option, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
               TypeError, ValueError):  # what timm's readers, torchvision and datasets raise for names they do not know
        dataset = create_dataset(
            source.dataset,
            root=source.data_dir,
            split=split,
            class_map=source.class_map,
            download=source.download,
            batch_size=batch_size,
            input_img_mode=source.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
            input_key=source.input_key,
            target_key=source.target_key,
            num_samples=num_samples,
            trust_remote_code=source.trust_remote_code,
            **kwargs,
        )
    if type(dataset) is ImageDataset:
        dataset = StrictImageDataset(source.data_dir, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
    indices = class_indices(dataset)
    if num_classes is not None and indices and max(indices.values()) >= num_classes:
        raise UserError(f'--num-classes {num_classes}: the dataset has {max(indices.values()) + 1} classes')
    return dataset


def _check_folder(root: Optional[str], split: str, need_split: bool) -> None:
    if not root:
        raise UserError('--data-dir: not given, where is the dataset?')
    if not os.path.exists(root):
        raise UserError(f'--data-dir {root}: no such folder')
    if os.path.isfile(root):
        return
    names = next((names for names in SPLIT_SYNONYMS.values() if split in names), (split,))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not folders or (need_split and not set(names) & set(folders)):
        found = f'holds {", ".join(folders[:5])}' if folders else 'holds no folders'
        raise UserError(f'--data-dir {root}: {found}, where a folder {" or ".join(names)} is expected')


def class_indices(dataset: Any) -> Dict[Any, int]:
    """Index of each class by its name; empty where a dataset does not say."""
    return getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}


def check_same_classes(train: Any, evaluation: Any) -> None:
    """Complain of a class that only one of two splits has.

    Class indices come from sorted folder names: such a class would shift the others silently.

    Raises:
        UserError: Names or indices of the classes differ.
    """
    classes = [class_indices(dataset) if hasattr(dataset, 'reader') else {} for dataset in (train, evaluation)]
    if all(classes) and classes[0] != classes[1]:
        differ = sorted(set(classes[0].items()) ^ set(classes[1].items()))
        raise UserError(f'--data-dir: classes of the splits differ, first in {differ[0][0]!r}; a --class-map can say '
                        'which index each class has')
