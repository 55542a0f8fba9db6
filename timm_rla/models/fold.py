"""Folding for inference: what is constant in evaluation is multiplied out once, by `timm.utils.reparameterize_model`.

Each batch norm goes into the convolution before it, where it is known that nothing happens in between: in the stem, in
the blocks of this package and in what of them is an nn.Sequential. All that lies between the pooled features of a block
and the gates of the LSTM is linear without an MLP in the context: resampling and W_ih, and for average pooling in a
bottleneck the last convolution and its norm, too, which commute with the pooling. It becomes one matrix [4M, C'] for
each block.

A folded network has the same blocks: only its contexts return input gates, and its cell takes these. Where somebody has
put another module into the place of a stage or a block, the cell must go on taking contexts and stays as it is.
"""
import weakref
from typing import Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import Context, pool
from ..ops.lstm import FoldedCell
from ..ops.vanilla import is_vanilla
from .blocks import RecurrentBlock, RecurrentStage, RLABasicBlock, RLABottleneck, is_pointwise

__all__ = ['FoldedContext', 'Folder', 'fold']

BLOCKS = (RLABasicBlock, RLABottleneck)


class Folder:
    """Stands on a part of a network under the name by which `reparameterize_model` asks parts to fold themselves.

    That function never asks the network as a whole, which alone knows of all that belongs together. The reference is a
    weak one, so that a network without other references is freed at once. A copy or pickle of the part has none; where
    it is that of a whole network, this sets it anew (`RecurrentLayerAttention.__setstate__`).
    """

    def __init__(self, network: Optional[nn.Module] = None):
        self.network = (lambda: None) if network is None else weakref.ref(network)

    def __call__(self) -> None:
        network = self.network()
        if network is not None:
            network.fold()

    def __reduce__(self):
        return Folder, ()


class FoldedContext(nn.Module):
    """From the pooled features of a block to the input gates of the LSTM.

    Args:
        context: The block's own context. It is only called if `linear` does not stand for it, too.
        linear: Linear map to the gates, from pooled features if `whole`, else from the context.
        whole: `linear` stands for the context.
        before_last_conv: `linear` also stands for last convolution and norm: what these are given is pooled.
    """

    def __init__(self, context: Context, linear: nn.Linear, whole: bool, before_last_conv: bool):
        super().__init__()
        self.context = None if whole else context
        self.linear = linear
        self.max_pool = context.max_pool
        self.before_last_conv = before_last_conv

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C]"""
        if self.context is not None:
            return self.context.pool(x)
        return pool(x, self.max_pool)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """[B, C] -> [B, 4M]"""
        if self.context is not None:
            pooled = self.context(pooled)
        return self.linear(pooled)


@torch.no_grad()
def fold(network: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Fold a vanilla network in evaluation mode in place, as far as its modules are vanilla, too.

    Args:
        network: RLA network.
        stages: Its stages.
    """
    _fold_pair(network, 'conv1', 'bn1')
    for child in network.children():
        _fold_norms(child)
    cell = network.lstm
    blocks = dict.fromkeys(block for stage in stages for block in stage.children())  # one may be there twice
    if (
        is_vanilla(cell, nn.LSTMCell)
        and cell.bias
        and all(is_vanilla(stage, RecurrentStage) for stage in stages)
        and all(_is_one_of(block, BLOCKS) for block in blocks)
    ):
        for block in blocks:
            block.context = _fold_context(block, cell)
        network.lstm = FoldedCell(cell.weight_hh).eval()


def _is_one_of(module: nn.Module, kinds: Tuple[Type[nn.Module], ...]) -> bool:
    return any(is_vanilla(module, kind) for kind in kinds)


def _fold_norms(module: nn.Module) -> None:
    """Put each batch norm into the convolution right before it, in a module whose order of calls is known."""
    if is_vanilla(module, nn.Sequential):
        names = list(module._modules)
        pairs = list(zip(names, names[1:]))
    elif _is_one_of(module, (RecurrentStage, *BLOCKS)):
        pairs = [(f'conv{i}', f'bn{i}') for i in (1, 2, 3) if f'conv{i}' in module._modules]
    else:
        return
    for name, norm_name in pairs:
        _fold_pair(module, name, norm_name)
    for child in module.children():
        _fold_norms(child)


def _fold_pair(module: nn.Module, name: str, norm_name: str) -> None:
    owner, conv, norm = module, getattr(module, name), getattr(module, norm_name)
    while is_vanilla(conv, nn.Sequential) and len(conv):  # such as a deep stem: its last module comes before the norm
        owner, name = conv, list(conv._modules)[-1]
        conv = getattr(owner, name)
    if (
        is_vanilla(conv, nn.Conv2d)
        and (is_vanilla(norm, nn.BatchNorm2d) or is_vanilla(norm, nn.SyncBatchNorm))
        and norm.running_mean is not None
    ):
        setattr(owner, name, fuse_conv_bn_eval(conv, norm))
        setattr(module, norm_name, nn.Identity())


def _fold_context(block: RecurrentBlock, cell: nn.LSTMCell) -> FoldedContext:
    context = block.context
    weight, bias = cell.weight_ih.double(), (cell.bias_ih + cell.bias_hh).double()
    whole = is_vanilla(context, Context) and context.mlp is None
    before_last_conv = False
    if whole:
        eye = torch.eye(context.channels, dtype=weight.dtype, device=weight.device)
        weight = weight @ context(eye).t()  # [4M, C]
        conv, norm, _ = block.tail()
        before_last_conv = not context.max_pool and is_pointwise(conv) and is_vanilla(norm, nn.Identity)
        if before_last_conv:
            if conv.bias is not None:
                bias = bias + weight @ conv.bias.double()
            weight = weight @ conv.weight.flatten(1).double()  # [4M, C']
    linear = nn.Linear(weight.shape[1], weight.shape[0], device='meta')
    linear.weight, linear.bias = (
        nn.Parameter(p.to(cell.weight_ih.dtype), requires_grad=cell.weight_ih.requires_grad) for p in (weight, bias))
    return FoldedContext(context, linear, whole, before_last_conv).eval()
