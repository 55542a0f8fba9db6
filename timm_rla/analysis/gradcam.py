"""Grad-CAM (Selvaraju et al., https://arxiv.org/abs/1610.02391) for many layers in one backward pass."""
import difflib
import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from .hooks import eval_mode, hooked

__all__ = ['GradCam', 'grad_cam', 'residual_norms']


class GradCam(NamedTuple):
    """Maps and what they explain."""
    maps: Dict[str, torch.Tensor]  # [B, h, w] of each layer, at its own resolution; not normalised
    logits: torch.Tensor  # [B, K]
    target: torch.Tensor  # class of each image [B]


def residual_norms(model: nn.Module) -> List[str]:
    """Names of the last norm of each residual block, in order: right before the layer attention scales its output.

    Args:
        model: A ResNet of timm or of this package, or a model that contains one.

    Raises:
        ValueError: There are no such blocks.
    """
    model = unwrap_model(model)
    names = []
    for name, block in model.named_modules():
        norms = [child for child, _ in block.named_children() if re.fullmatch(r'bn\d', child)]
        if norms and hasattr(block, 'downsample'):  # a residual block, not the stem
            names.append(f'{name}.{max(norms)}')
    if not names:
        raise ValueError(f'{type(model).__name__} has no residual blocks with bn2 or bn3; name the layers')
    return names


def grad_cam(
        model: nn.Module,
        images: torch.Tensor,
        target: Union[int, torch.Tensor, None] = None,
        layers: Optional[Sequence[str]] = None,
        relu: bool = True,
) -> GradCam:
    """Class activation maps of several layers, from one forward and one backward pass in eval mode.

    The model is left as it was: weights, gradients, statistics, training mode and hooks.

    Args:
        model: A classifier; compiled, wrapped in DDP, or neither.
        images: Normalised images [B, in_chans, H, W].
        target: Class, for all images or for each [B], in [0, K); the predicted one if None.
        layers: Names of modules with output [B, C, h, w]; the last norm of each residual block if None.
        relu: Drop negative evidence, as Grad-CAM does.

    Raises:
        ValueError: There is no such layer, it gives no feature map, or a class is out of range.
    """
    model = unwrap_model(model)
    modules = dict(model.named_modules())
    layers = residual_norms(model) if layers is None else list(dict.fromkeys(layers))
    for name in layers:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0)
            raise ValueError(f'there is no layer {name}; the nearest are {", ".join(close)}')
    names = {modules[name]: name for name in layers}
    features: Dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            raise ValueError(f'layer {names[module]} gives no feature map [B, C, h, w]')
        if not output.requires_grad:  # all before it is frozen
            output.requires_grad_()
        features[names[module]] = output
        return output.clone()  # timm adds the shortcut and applies ReLU in place

    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model), hooked(model, dict.fromkeys(names, keep)):
        logits = model(images.clone() if images.is_inference() else images)
        missing = [name for name in layers if name not in features]
        if missing:
            raise ValueError(f'layer {missing[0]} is not called in a forward pass')
        target = _as_classes(target, logits)
        score = logits.gather(1, target[:, None]).sum()  # in eval mode no image has a part in another one's score
        gradients = torch.autograd.grad(score, list(features.values()))
    maps = {
        name: _class_activation(feature.detach(), gradient, relu)
        for (name, feature), gradient in zip(features.items(), gradients)
    }
    return GradCam({name: maps[name] for name in layers}, logits.detach(), target)


def _class_activation(feature: torch.Tensor, gradient: torch.Tensor, relu: bool) -> torch.Tensor:
    """Channels weighted by their mean gradient: twice [B, C, h, w] -> [B, h, w]"""
    maps = (gradient.mean((2, 3), keepdim=True) * feature).sum(1)
    return maps.relu() if relu else maps


def _as_classes(target: Union[int, torch.Tensor, None], logits: torch.Tensor) -> torch.Tensor:
    if target is None:
        return logits.argmax(1)
    target = torch.as_tensor(target, device=logits.device).expand(len(logits))
    if target.min() < 0 or target.max() >= logits.shape[1]:
        raise ValueError(f'class {target.tolist()} is out of range, 0 to {logits.shape[1] - 1}')
    return target
