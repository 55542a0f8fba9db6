"""Warm start: weights of a network without layer attention become an RLA network that returns the same logits.

With W2 = 0 and b2 = 0 each head says a_l = sigmoid(0) = 0.5, exactly. With weight and bias of the last norm of each
block doubled the scaled branch is 0.5 * (2 * A_l) = A_l, exactly again, since both factors are powers of two. An
intra-layer attention that sees 2 * A_l gets half the weight in its first, linear, layer. Logits are then those of the
source bit for bit, in train mode with the general form of the blocks, and the gradient of W2 is not zero: the network
can learn from there.
"""
import logging
from typing import AbstractSet, Dict, List

import torch
import torch.nn as nn
from timm.layers import EcaModule, EffectiveSEModule, SEModule

from .network import RecurrentBlock

__all__ = [
    'INPUT_WEIGHTS', 'checkpoint_filter_fn', 'differing_keys', 'is_added', 'last_norm', 'plain_name', 'scaled_keys',
]

_logger = logging.getLogger(__name__)

# Intra-layer attention whose gate is a function of a linear layer of the pooled input: the weight of that layer
INPUT_WEIGHTS = {SEModule: 'fc1.weight', EffectiveSEModule: 'fc.weight', EcaModule: 'conv.weight'}
SCALING = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)  # activations f of a norm with f(2x) = 2 f(x)
LSTM_KEY = 'lstm.weight_ih'  # every checkpoint of an RLA network has it


def plain_name(name: str) -> str:
    """Name of the network without layer attention, such as 'resnet50' for 'rla_vector_resnet50'."""
    return name.split('.')[0].removeprefix('rla_').removeprefix('vector_')


def is_added(key: str) -> bool:
    """True for a key of a state dict that layer attention adds to the backbone's."""
    return key.startswith('lstm.') or '.attention.' in key or '.context.' in key


def last_norm(block: RecurrentBlock) -> str:
    """Name of the last norm of a block."""
    return 'bn3' if hasattr(block, 'bn3') else 'bn2'


def scaled_keys(state_dict: Dict[str, torch.Tensor], norm: str) -> List[str]:
    """Keys of what scales the output of a norm: its weight, and its bias if it has one.

    Args:
        state_dict: Of the network.
        norm: Name of the norm.

    Raises:
        ValueError: It has no weight.
    """
    if f'{norm}.weight' not in state_dict:
        raise ValueError(f'the last norm of a block must have a weight, which takes up the attention: {norm} has none')
    return [key for key in (f'{norm}.weight', f'{norm}.bias') if key in state_dict]


def _check_scales(norm: nn.Module) -> None:
    """Complain of a norm whose output weight and bias do not scale, since it has an activation or threshold.

    Raises:
        RuntimeError: It is one.
    """
    act = getattr(norm, 'act', None)
    if hasattr(norm, 'tau') or isinstance(act, nn.Module) and not isinstance(act, SCALING):
        part = 'threshold' if hasattr(norm, 'tau') else f'activation {type(act).__name__}'
        raise RuntimeError(
            f'no warm start with {type(norm).__name__} as the last norm of a block: its {part} does not scale with '
            f'weight and bias; there is one with norms without activation, or with '
            f'{", ".join(kind.__name__ for kind in SCALING[1:])}')


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """State dict for an RLA network from that of an RLA network, or of the network without layer attention.

    Args:
        state_dict: Of an RLA network: returned as it is. Of timm's or torchvision's ResNet, or of timm's ResNet with
            the intra-layer attention that the model has: turned into a warm start.
        model: RLA network with freshly initialised weights.

    Raises:
        RuntimeError: The keys are of neither; says which do not fit.
        ValueError: The last norm of a block has no weight.
    """
    own = model.state_dict()
    if LSTM_KEY in state_dict:
        _check_keys(state_dict, own.keys())  # timm does not, with another number of classes
        return state_dict
    added = {key for key in own if is_added(key)}
    _check_keys(state_dict, own.keys() - added)

    state_dict = dict(state_dict, **{key: own[key] for key in added})
    for name, block in model.named_modules():
        if not isinstance(block, RecurrentBlock):
            continue
        _check_scales(block.tail()[1])
        for key in scaled_keys(state_dict, f'{name}.{last_norm(block)}'):
            state_dict[key] = 2 * state_dict[key]
        if block.se is not None:
            weight = INPUT_WEIGHTS.get(type(block.se))
            if weight is None:
                raise RuntimeError(
                    f'no warm start with {type(block.se).__name__} inside the blocks; there is one with '
                    f'{", ".join(module.__name__ for module in INPUT_WEIGHTS)}')
            state_dict[f'{name}.se.{weight}'] = 0.5 * state_dict[f'{name}.se.{weight}']
        for key in (f'{name}.attention.fc2.weight', f'{name}.attention.fc2.bias'):
            state_dict[key] = torch.zeros_like(own[key])
    _logger.info('Warm start: backbone weights without layer attention; every layer attention is 0.5, untrained')
    return state_dict


def _check_keys(state_dict: Dict[str, torch.Tensor], expected: AbstractSet[str]) -> None:
    differences = differing_keys(state_dict.keys(), expected)
    if differences:
        raise RuntimeError(
            'weights are neither those of this network nor of the same network without layer attention: '
            + differences)


def differing_keys(found: AbstractSet[str], expected: AbstractSet[str]) -> str:
    """What the keys of a state dict lack of those of a ResNet, and have besides, in one line; empty if they agree."""
    def essential(keys):  # a classifier is adapted later, counters are not in old checkpoints
        return sorted(key for key in keys if not key.startswith('fc.') and not key.endswith('num_batches_tracked'))

    kinds = {'missing': essential(expected - found), 'unexpected': essential(found - expected)}
    return '; '.join(
        f'{kind} {", ".join(keys[:3])}' + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
        for kind, keys in kinds.items() if keys)
