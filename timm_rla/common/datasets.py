"""Datasets: timm's own, with every sample and every class accounted for."""
import os
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Sequence

from PIL import ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from .errors import UserError, blame, printable
from .image_folder import IMAGE_TYPES, check_folder, leave_out_hidden, left_out, shorten
from .strict_datasets import StrictImageDataset, StrictImageStream, StrictTorchDataset, renumber

__all__ = [
    'DataSource', 'check_same_classes', 'class_indices', 'describe_dataset', 'image_mode', 'label_names',
    'open_dataset', 'shuffles_in_workers',
]

TYPES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # of timm's datasets
CLASS_MAPS = ('.txt', '.pkl')  # endings of files that timm reads
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # of Pillow, by the number of channels


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


def image_mode(in_chans: int, wanted: Optional[str] = None) -> str:
    """Mode that Pillow converts images to for a network of 1 to 4 input channels.

    Args:
        in_chans: Channels.
        wanted: Another mode with as many channels, such as HSV.

    Raises:
        UserError: There is none.
    """
    if wanted:
        try:
            bands = len(ImageMode.getmode(wanted).bands)
        except KeyError:
            bands = 0
        if bands != in_chans:
            raise UserError(f'--input-img-mode {wanted}: ' + (
                f'has {bands} channel{"s" * (bands > 1)}, the network takes {in_chans}' if bands else
                'no mode of Pillow; RGB, HSV, LAB, YCbCr and L are some'))
        return wanted
    if in_chans not in _MODES:
        raise UserError(f'--in-chans {in_chans}: images are read with {", ".join(map(str, _MODES))} channels')
    return _MODES[in_chans]


def open_dataset(
        source: DataSource,
        split: str,
        in_chans: int = 3,
        num_classes: Optional[int] = None,
        num_samples: Optional[int] = None,
        batch_size: int = 1,
        split_option: str = '--split',
        counted_by: str = '--num-classes',
        names: Optional[Sequence[str]] = None,
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
        split_option: What names the split. With --split the folder of a split itself will do; else an image folder must
            hold its splits.
        counted_by: What says `num_classes`, for the message.
        names: Names of the model's classes by index, if they are known. Classes of the dataset get the index of their
            name, so that a folder without one of them does not shift the others.
        **kwargs: Further arguments of timm's `create_dataset`.

    Raises:
        UserError: Missing or empty folder, unknown dataset, more classes than the model has, or classes of other names.
    """
    if source.dataset:
        _check_name(source.dataset)
        if source.dataset.lower().startswith(('torch/', 'wds/')) and not source.data_dir:
            raise UserError(f'--data-dir: not given, where is {source.dataset}?')
    else:
        check_folder(source.data_dir, split, split_option)
    if source.class_map:
        _check_class_map(source.class_map, source.data_dir)
    dataset = _create(source, split, in_chans, num_samples, batch_size, **kwargs)
    if type(dataset) is ImageDataset:
        dataset = StrictImageDataset(dataset, source.data_dir, num_classes)
    elif source.dataset.lower().startswith('torch/'):
        dataset = StrictTorchDataset(
            dataset, image_mode(in_chans, source.input_img_mode), source.option, num_classes)
    elif type(dataset) is IterableImageDataset:
        dataset = StrictImageStream(dataset, source.data_dir, num_classes)
    if hasattr(dataset, '__len__') and not len(dataset):
        raise UserError(f'{split_option} {split}: holds no images')
    if names and not source.class_map:
        renumber(dataset, _indices_by_name(class_indices(dataset), names, source.option), class_indices(dataset))
    indices = class_indices(dataset)
    if '' in indices:  # timm's name for the class of images that lie in no folder of a class
        raise UserError(f'{source.option}: images outside of the folders of classes, in {dataset.reader.root}')
    if num_classes is not None and indices and max(indices.values()) >= num_classes:
        raise UserError(f'{counted_by} {num_classes}: the dataset has {max(indices.values()) + 1} classes')
    return dataset


def _create(
        source: DataSource,
        split: str,
        in_chans: int,
        num_samples: Optional[int],
        batch_size: int,
        **kwargs: Any,
) -> Any:
    """timm's `create_dataset`, without what is hidden. Arguments as in `open_dataset`."""
    if not source.input_key and not source.dataset and os.path.isdir(source.data_dir):
        source = replace(source, input_key=';'.join(IMAGE_TYPES))  # what timm's reader of folders takes them for
    with blame(source.option, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
               TypeError, ValueError):  # of timm's readers, torchvision, datasets for unknown names
        dataset = create_dataset(
            source.dataset,
            root=source.data_dir,
            split=split,
            class_map=source.class_map,
            download=source.download,
            batch_size=batch_size,
            input_img_mode=image_mode(in_chans, source.input_img_mode),
            input_key=source.input_key,
            target_key=source.target_key,
            num_samples=num_samples,
            trust_remote_code=source.trust_remote_code,
            **kwargs,
        )
    if isinstance(getattr(dataset, 'reader', None), ReaderImageFolder):
        leave_out_hidden(dataset.reader, source.option, number_anew=not source.class_map)
    return dataset


def _check_name(dataset: str) -> None:
    """Complain of a dataset without one of timm's types: timm would read the folder of images instead."""
    kind, slash, name = dataset.partition('/')
    if not slash or kind.lower() not in TYPES:
        hint = f'; torch/{dataset}?' if not slash else ''
        raise UserError(f'--dataset {dataset}: no type of dataset; a name is <type>/<name>, the types are '
                        f'{", ".join(f"{name}/" for name in TYPES)}{hint}')


def _check_class_map(path: str, root: Optional[str]) -> None:
    """Complain of a file that timm would not find, in the current folder or in that of the data, or not read."""
    if not any(map(os.path.isfile, (path, os.path.join(root or '', path)))):
        raise UserError(f'--class-map {path}: no such file')
    if not path.lower().endswith(CLASS_MAPS):
        raise UserError(f'--class-map {path}: the ending must be {" or ".join(CLASS_MAPS)}')


# Classes -----------------------------------------------------------------------------------------------------------

def class_indices(dataset: Any) -> Dict[Any, int]:
    """Index of each class by its name; empty where a dataset does not say."""
    reader = getattr(dataset, 'reader', None)
    return (getattr(dataset, 'class_to_idx', None) or getattr(reader, 'class_to_idx', None)
            or getattr(reader, 'class_name_to_idx', None) or {})


def label_names(dataset: Any) -> Optional[List[str]]:
    """Name of each class by its index; None where a dataset does not name each."""
    names = {index: name for name, index in class_indices(dataset).items() if isinstance(name, str)}
    return [names[index] for index in sorted(names)] if names and set(names) == set(range(len(names))) else None


def _indices_by_name(indices: Dict[Any, int], names: Sequence[str], option: str) -> Dict[Any, int]:
    """The model's own index of each class of a dataset.

    Raises:
        UserError: A class that the model does not have.
    """
    own = {name: index for index, name in enumerate(names)}
    foreign = [name for name in indices if name not in own]
    if foreign:
        raise UserError(f'{option}: class {foreign[0]!r} is none of those that the network was trained on '
                        f'({shorten(names)}); a --class-map can say which index each class has')
    return {name: own[name] for name in indices}


def check_same_classes(train: Any, evaluation: Any) -> None:
    """Complain of a class that only one of two splits has.

    Class indices come from sorted folder names: such a class would shift the others silently.

    Raises:
        UserError: Names or indices of the classes differ.
    """
    classes = [class_indices(dataset) for dataset in (train, evaluation)]
    if all(classes) and classes[0] != classes[1]:
        differ = sorted(set(classes[0].items()) ^ set(classes[1].items()))
        raise UserError(f'--data-dir: classes of the splits differ, first in {differ[0][0]!r}; a --class-map can say '
                        'which index each class has')


# What was found ----------------------------------------------------------------------------------------------------

def shuffles_in_workers(dataset: Any) -> bool:
    """True for a stream whose samples come in an order that the workers draw and nobody else knows."""
    return type(getattr(dataset, 'reader', None)).__name__ in ('ReaderWds', 'ReaderTfds')


def describe_dataset(dataset: Any, split: str, num_samples: Optional[int] = None) -> str:
    """One line: images and classes of a split, and what of an image folder was left out and why.

    Args:
        dataset: As from `open_dataset`.
        split: Name of the split.
        num_samples: What was asked for, which timm passes over where a split is no stream.
    """
    count = f'{len(dataset):,} images' if hasattr(dataset, '__len__') else 'a stream of images'
    names = list(class_indices(dataset))
    classes = f', {len(names)} classes ({shorten(names)})' if names else ''
    whole = num_samples is not None and not isinstance(dataset, IterableImageDataset)
    read = f'; all are read, a number of samples ({num_samples}) is for streams alone' if whole else ''
    return printable(f'{split}: {count}{classes}{left_out(getattr(dataset, "reader", None))}{read}')
