"""timm's and torchvision's datasets, where an image that cannot be read is an error that names it.

So is a label that is no class of the network, which on a GPU would end the process without a word about it.
"""
import numbers
from functools import partial
from operator import getitem
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import Dataset

from .._timm import report_webdataset_errors
from .errors import UserError, one_line
from .pixels import eight_bits, transformed

__all__ = ['StrictImageDataset', 'StrictImageStream', 'StrictTorchDataset', 'renumber']


class StrictImageDataset(ImageDataset):
    """timm's ImageDataset, where an image that cannot be read is an error that names it, not one that is skipped.

    Args:
        dataset: timm's, without a transform.
        root: Its folder.
        num_classes: Classes of the network, not checked if None.
    """

    def __init__(self, dataset: ImageDataset, root: Optional[str], num_classes: Optional[int] = None):
        super().__init__(root, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
        self.num_classes = num_classes

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        try:
            file, target = self.reader[index]
            image = eight_bits(Image.open(file))
            image = image.convert(self.input_img_mode) if self.input_img_mode else image
        except UnidentifiedImageError as e:
            raise UserError(f'cannot read image {self._name(index)}: no image of a type that Pillow reads') from e
        except Exception as e:  # PIL raises whatever its decoders raise
            raise UserError(f'cannot read image {self._name(index)}: {one_line(e)}') from e
        if self.transform is not None:
            image = transformed(self.transform, image, f'image {self._name(index)}')
        if target is None:
            target = -1
        else:
            _check_label(target, self.num_classes, lambda: self._name(index))
            if self.target_transform is not None:
                target = self.target_transform(target)
        return image, target

    def _name(self, index: int) -> str:
        """File of an image, or its number where it lies in no file of its own."""
        try:
            name = self.filename(index, absolute=True)
        except Exception:  # readers raise whatever a damaged file leads them to
            name = None
        return name or f'{index} of the split'


class StrictImageStream(IterableImageDataset):
    """timm's IterableImageDataset, where a sample that cannot be read is an error that names it.

    Readers of files hand on the images as they are, to be converted here; that of TFDS has arrays, not files.

    Args:
        dataset: timm's, without a transform.
        root: Its folder.
        num_classes: Classes of the network, not checked if None.
    """

    def __init__(self, dataset: IterableImageDataset, root: Optional[str], num_classes: Optional[int] = None):
        super().__init__(root, reader=dataset.reader)
        self.num_classes = num_classes
        self.mode = None
        if type(self.reader).__name__ in ('ReaderWds', 'ReaderHfids'):
            self.mode, self.reader.input_img_mode = self.reader.input_img_mode, None

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        if type(self.reader).__name__ == 'ReaderWds':  # in each worker anew
            report_webdataset_errors(_cannot_read)
        try:
            for image, target in self.reader:
                _check_label(target, self.num_classes, lambda: 'of the stream')
                image = eight_bits(image).convert(self.mode) if self.mode else image
                image = self.transform(image) if self.transform is not None else image
                yield image, self.target_transform(target) if self.target_transform is not None else target
        except (UserError, GeneratorExit):
            raise
        except Exception as e:  # readers and PIL raise whatever a damaged sample leads them to
            _cannot_read('', e)


class StrictTorchDataset(Dataset):
    """A data set of torchvision that reads images as timm's ImageDataset does, and names those that it cannot read.

    Args:
        dataset: torchvision's, without a transform.
        mode: Mode of Pillow that images are converted to.
        option: What names it, for messages.
        num_classes: Classes of the network, not checked if None.
    """

    def __init__(self, dataset: Any, mode: str, option: str, num_classes: Optional[int] = None):
        self.dataset = dataset
        self.mode = mode
        self.option = option
        self.num_classes = num_classes
        self.transform: Optional[Callable[[Any], Any]] = None
        self.target_transform: Optional[Callable[[Any], Any]] = None
        self.class_to_idx = getattr(dataset, 'class_to_idx', None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        name = f'{index} of {self.option}'
        try:
            image, target = self.dataset[index]
            if not isinstance(image, Image.Image):
                raise ValueError(f'it is a {type(image).__name__}')
            image = eight_bits(image)
            image = image if image.mode == self.mode else image.convert(self.mode)
        except Exception as e:  # torchvision and PIL raise whatever a damaged file leads them to
            _cannot_read(name, e)
        _check_label(target, self.num_classes, lambda: name)
        target = target if self.target_transform is None else self.target_transform(target)
        return image if self.transform is None else transformed(self.transform, image, f'image {name}'), target


def renumber(dataset: Any, indices: Dict[Any, int], before: Dict[Any, int]) -> None:
    """Give the classes of a dataset other indices, in place.

    Args:
        dataset: One of the above.
        indices: By the names of the classes.
        before: Those that the dataset gives them.
    """
    dataset.class_to_idx = indices
    if indices != before:
        dataset.target_transform = partial(getitem, {before[name]: index for name, index in indices.items()})


def _check_label(label: Any, num_classes: Optional[int], name: Callable[[], str]) -> None:
    if num_classes and isinstance(label, numbers.Integral) and not 0 <= label < num_classes:
        raise UserError(f'image {name()}: its label is {label}, the network has classes 0 to {num_classes - 1}')


def _cannot_read(name: str, error: Exception) -> None:
    if isinstance(error, UserError):
        raise error
    raise UserError(f'cannot read image {name}: {one_line(error)}') from error
