"""Grad-CAM of an image for one network or several."""
from contextlib import nullcontext
from typing import Dict, NamedTuple, Optional, Sequence

import torch
from PIL import Image

from ..common.device import NETWORK_ERRORS
from ..common.errors import blame
from ..common.images import ImageNetwork
from .attention import attention_modules, normalize_attention, record_attention, stack_attention
from .classes import short_name
from .gradcam import GradCam, grad_cam
from .gradcam_plot import Explanation, NetworkMaps

__all__ = ['explain']


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
            f'{network.name}: {_class_text(observation, names, shown)}{_prediction(observation, names, shown)}',
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
    pixels = network.pixels(image, mode)
    model = network.model
    device = next(model.parameters()).device
    has_attention = bool(attention_modules(model))
    with record_attention(model) if has_attention else nullcontext() as attention, \
            blame(f'--model {network.name}', *NETWORK_ERRORS), \
            blame(f'--layers {" ".join(layers)}' if layers else f'--model {network.name}', ValueError):
        cam = grad_cam(model, pixels[None].to(device), target, layers)
    mean, std = (torch.tensor(network.data_config[key])[:, None, None] for key in ('mean', 'std'))
    return _Observation(
        (pixels * std + mean).clamp(0, 1),
        cam,
        cam.logits.softmax(1)[0].cpu(),
        dict(zip(attention, normalize_attention(stack_attention(attention))[0].tolist())) if has_attention else None,
    )


def _prediction(observation: _Observation, names: Sequence[str], shown: int) -> str:
    """What a network predicts, if it is another class than the one that is shown."""
    predicted = int(observation.probabilities.argmax())
    return '' if predicted == shown else f' (it predicts {_class_text(observation, names, predicted)})'


def _class_text(observation: _Observation, names: Sequence[str], index: int) -> str:
    return f'{short_name(names[index])}, {observation.probabilities[index]:.1%}'
