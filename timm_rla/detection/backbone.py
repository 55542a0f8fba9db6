"""Networks of timm as backbones of torchvision's detectors: created, frozen in part, and with a feature pyramid."""
import re
from collections import OrderedDict
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import create_model
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..common.networks import NetworkSpec, network_class
from ..common.trained import architecture_arguments, check_sizes, training_options
from ..models.warm_start import is_added

__all__ = ['PyramidBackbone', 'create_network', 'freeze_stages', 'trained_with']


def create_network(
        name: str,
        pretrained: Union[bool, str],
        checkpoint: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """A network of timm, with the weights of a classification network.

    Args:
        name: Name of a model.
        pretrained: True for the weights that timm hosts, a file for those of a checkpoint of classification, also
            with another number of classes; False for random ones.
        checkpoint: What the file holds, as from `read_checkpoint`; timm reads it again, older versions with code in it.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        RuntimeError: The file is of another network.
    """
    if checkpoint is None:
        return create_model(name, pretrained=pretrained, **kwargs)
    overlay = dict(file=pretrained, num_classes=-1)  # -1: whatever the classes are
    network = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    _check_keys(checkpoint['state_dict'], network.state_dict())
    return network


def trained_with(checkpoint: Dict[str, Any], source: str, name: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What a checkpoint of classification says of its network and of its input, which the weights go with.

    Args:
        checkpoint: As from `read_checkpoint`.
        source: Option and file, for messages.
        name: Name of the network that takes its weights.

    Returns:
        Arguments of the network, and `image_mean` and `image_std` where the run had its own.

    Raises:
        UserError: It is damaged.
    """
    options = training_options(checkpoint, source)
    given = NetworkSpec().completed(options).model_kwargs if options else {}
    network = architecture_arguments(given, network_class(name), source) if given else {}
    check_sizes(network, checkpoint['state_dict'], source)
    return network, {f'image_{key}': tuple(options[key]) for key in ('mean', 'std') if options.get(key)}


def _check_keys(found: Iterable[str], expected: Iterable[str]) -> None:
    """Complain of weights of a network with more or fewer layers, which timm loads as far as they go.

    Layer attention may be missing. What timm cuts off may be left over: a classifier, and of networks that are not
    ResNets the last layers. timm's feature extractors prefix names, or join them by _. Where no name fits, they are
    those of another library, which timm translates.
    """
    found, expected = (_by_name(keys) for keys in (found, expected))
    missing = [key for name, key in expected.items() if name not in found and not is_added(key)]
    left = [key for name, key in found.items() if name not in expected and re.match(r'layer[1-4]\.|lstm\.', key)]
    if (missing or left) and expected.keys() & found.keys():
        raise RuntimeError(f'weights of another network: {len(missing)} are missing, {len(left)} left over, such as '
                           f'{min(missing or left)}')


def _by_name(keys: Iterable[str]) -> Dict[str, str]:
    """Keys of a state dict but for counters, by names that feature extractors have, too."""
    keys = (re.sub(r'^(module\.|model\.)*', '', key) for key in keys if not key.endswith('num_batches_tracked'))
    return {key.replace('.', '_'): key for key in keys}


def freeze_stages(network: nn.Module, ends: Sequence[str], trainable_layers: int) -> None:
    """Exclude the first stages of a network from training.

    Args:
        network: The network, its modules in the order in which they run.
        ends: Names of the modules that end the stages of strides 4, 8, 16 and 32, as in timm's `feature_info`.
        trainable_layers: Number of stages that are trained, counted from the last: 0 for none, 4 for all but the stem,
            5 for all. What runs along all stages, such as the LSTM, is trained as soon as one is.

    Raises:
        ValueError: The network has no such modules, and stages are to be frozen.
    """
    if trainable_layers > len(ends):
        return
    order = [name for name, _ in network.named_modules()]
    first, last = zip(*(_span(order, end) for end in ends))
    for i, module in enumerate(network.modules()):
        stage = 0 if i < first[0] else 1 + sum(i > end for end in last[:-1])  # 0 is the stem
        if stage <= len(ends) - trainable_layers:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _span(order: Sequence[str], name: str) -> Tuple[int, int]:
    """First and last position of a module and all in it; timm's feature extractors prefix names, or join them by _."""
    found = next((n for n in order if n in (name, name.replace('.', '_', 1)) or n.endswith(f'.{name}')), None)
    if found is None:
        raise ValueError(f'trainable_layers: this network has no module {name} that ends a stage; only 5 will do, all')
    inside = [i for i, n in enumerate(order) if n == found or n.startswith(f'{found}.')]
    return inside[0], inside[-1]


class PyramidBackbone(nn.Module):
    """A network of timm with a feature pyramid on its stages of strides 4, 8, 16 and 32.

    Args:
        body: Returns the feature maps of these stages, made with `features_only=True`.
        out_channels: Channels of the pyramid.
    """

    def __init__(self, body: nn.Module, out_channels: int = 256):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """[B, 3, H, W] -> maps [B, 256, H / s, W / s] by name: '0' to '3' of strides s = 4 to 32, 'pool' of 64"""
        maps: Dict[str, torch.Tensor] = OrderedDict()
        for i, features in enumerate(self.body(x)):
            maps[str(i)] = features
        return self.fpn(maps)
