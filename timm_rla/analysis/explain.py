"""Grad-CAM for image files: read them, preprocess them for each network, explain them."""
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from ..common.datasets import IMAGE_TYPES, image_mode
from ..common.errors import UserError, blame, one_line
from ..common.networks import Network
from .attention import attention_modules, normalize_attention, record_attention, stack_attention
from .classes import short_name
from .gradcam import GradCam, grad_cam
from .gradcam_plot import Explanation, NetworkMaps

__all__ = ['ImageNetwork', 'explain', 'find_images', 'prepare_network', 'read_image']


class ImageNetwork(NamedTuple):
    """A network and its preprocessing of images."""
    name: str
    model: nn.Module  # on its device
    data_config: Dict[str, Any]  # timm's
    label_names: Optional[List[str]]  # of its classes by index, if they are known
    transform: transforms.Compose  # image to normalised pixels [in_chans, H, W]


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


def find_images(names: Sequence[str]) -> Tuple[List[Path], List[str]]:
    """Files of images: those given, and those directly in given folders, in the order of their names.

    Args:
        names: Files and folders. Files are not opened here.

    Returns:
        The files, and a message for each folder without images.
    """
    paths: List[Path] = []
    problems: List[str] = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_TYPES)
            if not found:
                problems.append(f'{path}: a folder without images')
            paths += found
        else:
            paths.append(path)
    return paths, problems


def read_image(path: Path) -> Image.Image:
    """Read an image as a whole.

    Raises:
        UserError: There is none, or it is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as e:  # PIL raises whatever its decoders raise
        reason = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)
        raise UserError(f'cannot read image {path}: {reason}') from e


def explain(
        image: Image.Image,
        title: str,
        networks: Sequence[ImageNetwork],
        names: Sequence[str],
        target: Optional[int] = None,
        layers: Optional[Sequence[str]] = None,
        mode: Optional[str] = None,
) -> Explanation:
    """Class activation maps of an image, and its layer attention where a network has any, for one class.

    Args:
        image: Of any size and mode.
        title: What the image is called.
        networks: Networks with the same K classes, from top to bottom.
        names: Names of the classes [K].
        target: Class to explain, in [0, K); the one that the last network predicts if None.
        layers: Names of the modules to show; the last norm of each residual block if None.
        mode: Mode of PIL that the image is converted to; by the number of input channels if None.

    Returns:
        The networks in their order; the title says what the last one predicts.

    Raises:
        UserError: A network has no such layer, or cannot take the image.
    """
    observed = [_observe(networks[-1], image, target, layers, mode)]
    shown = int(observed[0].cam.target)
    observed = [_observe(network, image, shown, layers, mode) for network in networks[:-1]] + observed
    title = f'{title}: {_class_text(observed[-1], names, shown)}'
    predicted = int(observed[-1].probabilities.argmax())
    if target is None:
        title += ' (predicted)'
    elif predicted != target:
        title += f' (predicted: {_class_text(observed[-1], names, predicted)})'
    return Explanation(title, [
        NetworkMaps(
            f'{network.name}: {_class_text(observation, names, shown)}',
            observation.picture,
            {layer: activation[0].cpu() for layer, activation in observation.cam.maps.items()},
            observation.attention,
        ) for network, observation in zip(networks, observed)
    ])


class _Observation(NamedTuple):
    """Grad-CAM and layer attention of one network for one image."""
    picture: torch.Tensor  # input before normalisation, [in_chans, H, W] in [0, 1]
    cam: GradCam
    probabilities: torch.Tensor  # of the classes [K]
    attention: Optional[Dict[str, float]]  # normalised layer attention of each block, of an RLA network


def _observe(
        network: ImageNetwork,
        image: Image.Image,
        target: Optional[int],
        layers: Optional[Sequence[str]],
        mode: Optional[str],
) -> _Observation:
    in_chans = network.data_config['input_size'][0]
    with blame('model input', RuntimeError, ValueError):
        pixels = network.transform(image.convert(mode or image_mode(in_chans)))  # [in_chans, H, W]
    model = network.model
    device = next(model.parameters()).device
    has_attention = bool(attention_modules(model))
    with record_attention(model) if has_attention else nullcontext() as attention, \
            blame(f'--layers {" ".join(layers)}' if layers else f'--model {network.name}', ValueError):
        cam = grad_cam(model, pixels[None].to(device), target, layers)
    mean, std = (torch.tensor(network.data_config[key])[:, None, None] for key in ('mean', 'std'))
    return _Observation(
        (pixels * std + mean).clamp(0, 1),
        cam,
        cam.logits.softmax(1)[0].cpu(),
        dict(zip(attention, normalize_attention(stack_attention(attention))[0].tolist())) if has_attention else None,
    )


def _class_text(observation: _Observation, names: Sequence[str], index: int) -> str:
    return f'{short_name(names[index])}, {observation.probabilities[index]:.1%}'
