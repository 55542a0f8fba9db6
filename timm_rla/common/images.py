"""Image files: found, read, and made into the input of a network."""
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from .datasets import image_mode
from .errors import UserError, blame, one_line
from .image_folder import IMAGE_TYPES
from .networks import Network
from .pixels import eight_bits, transformed

__all__ = ['ImageNetwork', 'find_images', 'prepare_network', 'read_image']


class ImageNetwork(NamedTuple):
    """A network and its preprocessing of images."""
    name: str
    model: nn.Module  # on its device
    data_config: Dict[str, Any]  # timm's
    label_names: Optional[List[str]]  # of its classes by index, if they are known
    image_mode: Optional[str]  # of Pillow, that it was trained on; by the number of input channels if None
    transform: transforms.Compose  # image to normalised pixels [in_chans, H, W]

    def pixels(self, image: Image.Image, mode: Optional[str] = None) -> torch.Tensor:
        """Input of the network for an image: normalised, [in_chans, H, W].

        Args:
            image: Of any size and mode.
            mode: Mode of Pillow that it is converted to; that of training if None.

        Raises:
            UserError: The network cannot take it.
        """
        with blame('model input', RuntimeError, ValueError):
            image = image.convert(image_mode(self.data_config['input_size'][0], mode or self.image_mode))
            return transformed(self.transform, image, 'an image')


def prepare_network(network: Network, crop_border_pixels: Optional[int] = None) -> ImageNetwork:
    """Add the preprocessing of images that a network's data configuration describes.

    Args:
        network: As from `load_network`, on its device.
        crop_border_pixels: Crop this border first.

    Raises:
        UserError: The data configuration has values that timm rejects.
    """
    with blame('model input', AssertionError, LookupError, TypeError, ValueError):
        transform = create_transform(
            **network.data_config, crop_border_pixels=crop_border_pixels, is_training=False)
    return ImageNetwork(*network, transform)


def find_images(names: Sequence[str], recursive: bool = False) -> Tuple[List[Path], List[str]]:
    """Files of images: those given, and those in given folders, in the order of their names.

    Args:
        names: Files and folders. Files are not opened here.
        recursive: Also look into the folders of the folders.

    Returns:
        The files, and a message for each folder without images.
    """
    paths: List[Path] = []
    problems: List[str] = []
    for path in map(Path, names):
        if os.path.isdir(path):
            found = sorted(_images_in(path, recursive, problems))
            if not found:
                problems.append(f'{path}: a folder without images')
            paths += found
        else:
            paths.append(path)
    return paths, problems


def _images_in(folder: Path, recursive: bool, problems: List[str]) -> Iterator[Path]:
    """Images in a folder, and in its folders, linked ones, too, each once; none that is hidden, as programs leave them.

    Folders that cannot be read become problems.
    """
    seen = set()  # a link may lead back
    for parent, folders, files in os.walk(
            folder, followlinks=True, onerror=lambda e: problems.append(f'{e.filename}: {e.strerror}')):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if recursive and not name.startswith('.')]
        for path in (Path(parent, name) for name in files if not name.startswith('.')):
            if path.suffix.lower() in IMAGE_TYPES and os.path.isfile(path):
                yield path


def read_image(path: Path) -> Image.Image:
    """Read an image as a whole.

    Raises:
        UserError: There is none, or it is damaged.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # whoever opens a pipe may wait for ever
        raise UserError(f'cannot read image {path}: no plain file')
    try:
        with Image.open(path) as image:
            image.load()
            return eight_bits(image)
    except Exception as e:  # PIL raises whatever its decoders raise
        reason = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)
        raise UserError(f'cannot read image {path}: {reason}') from e
