"""Pixels of images: scaled to 8 bits, where Pillow would cut off what is above 255, and to the size of a network."""
from typing import Any, Callable, Tuple

import numpy as np
from PIL import Image
from timm.data.transforms import TrimBorder

from .errors import UserError, blame

__all__ = ['check_size', 'eight_bits', 'transformed']

OF_16_BITS = ('PNG', 'PPM')  # formats whose greys of mode I have 16 bits, never 32


def eight_bits(image: Image.Image) -> Image.Image:
    """The same image with 8 bits for each channel; as it is where it has no more.

    16 bits are scaled from [0, 65535], floating-point numbers from [0, 1].

    Raises:
        ValueError: Nobody can tell which number is white.
    """
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format in OF_16_BITS:
        pixels = np.asarray(image).astype(np.float32) / 65535
    elif image.mode == 'I':
        raise ValueError('whole numbers of 32 bits, whose white is not known; save it with 8 or 16 bits')
    elif image.mode == 'F':
        pixels = np.asarray(image)
        if not 0 <= pixels.min() <= pixels.max() <= 1:  # nor with nan
            raise ValueError(f'floating-point numbers from {pixels.min():g} to {pixels.max():g}, whose white is not '
                             'known; scale them to [0, 1]')
    else:
        return image
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def check_size(image: Image.Image, size: Tuple[int, int], option: str) -> None:
    """Complain of an image that would be scaled where nobody has asked for it.

    Args:
        image: The image.
        size: Height and width of a network's input.
        option: What takes images as they are.

    Raises:
        UserError: It has another size.
    """
    if (image.height, image.width) != size:
        raise UserError(f'{option}: an image of {image.width} x {image.height} pixels, where the network takes '
                        f'{size[1]} x {size[0]}; --img-size N scales all images')


def transformed(transform: Callable[[Any], Any], image: Image.Image, subject: str) -> Any:
    """What a transform makes of an image.

    Args:
        transform: As from timm's `create_transform`.
        image: Of any size.
        subject: What it is, for the message.

    Raises:
        UserError: The transform cannot take it.
    """
    border = max((part.border_size for part in getattr(transform, 'transforms', ()) if isinstance(part, TrimBorder)),
                 default=0)
    if 2 * border >= min(image.size):
        raise UserError(f'--crop-border-pixels {border}: leaves nothing of {subject} of {image.width} x {image.height} '
                        'pixels')
    size = f'{image.width} x {image.height} pixels'
    with blame(f'{subject} of {size}, {image.mode}', ArithmeticError, MemoryError, ValueError):
        return transform(image)
