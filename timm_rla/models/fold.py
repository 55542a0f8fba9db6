"""Folding for inference: what is constant in evaluation is multiplied out once, by `timm.utils.reparameterize_model`.

Each batch norm goes into the convolution before it. With global average pooling as context, all that lies between the
pooled features of a block and the gates of the LSTM is linear: resampling and W_ih, and in a bottleneck also the last
convolution and its norm, which commute with the pooling. It becomes one matrix [4M, C'] for each block.
"""
import weakref
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .._torch import is_hooked
from .blocks import is_pointwise

__all__ = ['Folder', 'fold_gates', 'fold_norms']


class Folder:
    """Stands on a part of a network under the name by which `reparameterize_model` asks parts to fold themselves.

    That function never asks the network as a whole, which alone knows of all that belongs together. The reference is a
    weak one, so that a network without other references is freed at once; copies and pickles of the network keep it.
    """

    def __init__(self, network: Optional[nn.Module]):
        self._network = (lambda: None) if network is None else weakref.ref(network)

    def __call__(self) -> None:
        network = self._network()
        if network is not None:
            network.fold()

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'Folder':
        return Folder(memo.get(id(self._network())))

    def __reduce__(self):
        return Folder, (self._network(),)


def _fold_pair(owner: nn.Module, name: str, norm_owner: nn.Module, norm_name: str) -> None:
    conv, norm = getattr(owner, name), getattr(norm_owner, norm_name)
    if (
        type(conv) is nn.Conv2d
        and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        and norm.running_mean is not None
        and not is_hooked(conv)  # pruning, weight norm, or somebody who looks
        and not is_hooked(norm)
    ):
        setattr(owner, name, fuse_conv_bn_eval(conv, norm))
        setattr(norm_owner, norm_name, nn.Identity())


def fold_norms(module: nn.Module) -> None:
    """Put each batch norm, in evaluation, into the convolution that comes right before it."""
    for child in module.modules():
        names = list(child._modules)
        if isinstance(child, nn.Sequential):
            for name, following in zip(names, names[1:]):
                _fold_pair(child, name, child, following)
            continue
        for name in names:  # conv1, bn1 and so on, as timm's ResNet and its blocks name them
            norm_name = name.replace('conv', 'bn')
            if norm_name == name or norm_name not in names:
                continue
            conv = getattr(child, name)
            if isinstance(conv, nn.Sequential):  # a deep stem, whose last convolution comes before the norm
                _fold_pair(conv, list(conv._modules)[-1], child, norm_name)
            else:
                _fold_pair(child, name, child, norm_name)


def fold_gates(block: nn.Module, cell: nn.LSTMCell) -> None:
    """Give a block one linear map from its pooled features, before the last convolution if it can be, to the gates."""
    context = block.context
    if context.max_pool or context.mlp is not None:
        return
    conv, norm, _ = block.last_layers()
    weight, bias = cell.weight_ih.double(), (cell.bias_ih + cell.bias_hh).double()
    eye = torch.eye(context.channels, dtype=weight.dtype, device=weight.device)
    weight = weight @ context(eye).t()  # [4M, C]
    first = is_pointwise(conv) and type(norm) is nn.Identity
    if first:
        if conv.bias is not None:
            bias = bias + weight @ conv.bias.double()
        weight = weight @ conv.weight.flatten(1).double()  # [4M, C']
    gates = nn.Linear(weight.shape[1], weight.shape[0], device='meta')
    gates.weight, gates.bias = (
        nn.Parameter(p.to(cell.weight_ih.dtype), requires_grad=cell.weight_ih.requires_grad) for p in (weight, bias))
    block.gates, block.pools_first = gates.eval(), first
