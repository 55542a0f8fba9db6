"""Recording the layer attentions of a network while it runs."""
from contextlib import contextmanager
from typing import Dict, Iterator, Tuple

import torch
import torch.nn as nn

from ..layers import LayerAttention
from .hooks import hooked

__all__ = ['attention_modules', 'normalize_attention', 'record_attention', 'stack_attention']

WRAPPERS = ('module', '_orig_mod')  # what DDP and torch.compile put into the names of modules


def attention_modules(model: nn.Module) -> Dict[str, LayerAttention]:
    """The heads that infer the layer attentions, by the names of their blocks, such as 'layer1.0', in order.

    Args:
        model: Any model; compiled, wrapped in DDP, or neither. Only RLA networks have such heads.
    """
    heads = {}
    for name, module in model.named_modules():
        if isinstance(module, LayerAttention):
            parts = [part for part in name.split('.') if part not in WRAPPERS]
            heads['.'.join(parts[:-1])] = module
    return heads


@contextmanager
def record_attention(model: nn.Module) -> Iterator[Dict[str, torch.Tensor]]:
    """Record the layer attentions of a model's last forward pass::

        with record_attention(model) as attention:
            model(images)
        attention['layer1.0']  # [B, 1]

    Compiled code runs eagerly meanwhile. Afterwards, also after an error, the model is as it was.

    Args:
        model: An RLA network or a model that contains one; compiled, wrapped in DDP, or neither.

    Yields:
        Layer attention a_l of each block by its name, [B, 1] or, of RLA-vector, [B, C], in (0, 1), detached. Each
        forward pass replaces it, so that any number of them needs no more memory than one.

    Raises:
        ValueError: The model has no layer attention.
    """
    names = {head: name for name, head in attention_modules(model).items()}
    if not names:
        raise ValueError(f'{type(model).__name__} has no layer attention; networks named rla_* have')
    attention: Dict[str, torch.Tensor] = {}

    def record(head: nn.Module, args: Tuple[torch.Tensor], output: torch.Tensor) -> None:
        attention[names[head]] = output.detach()

    with hooked(model, dict.fromkeys(names, record)):
        yield attention


def stack_attention(attention: Dict[str, torch.Tensor]) -> torch.Tensor:
    """One value per image and block, of RLA-vector the mean over channels: L entries [B, 1] or [B, C] -> [B, L]"""
    return torch.stack([a.mean(1) for a in attention.values()], 1)


def normalize_attention(attention: torch.Tensor) -> torch.Tensor:
    """Layer attentions of each image with mean 0 and sample standard deviation 1 over the blocks (Figure 4).

    [B, L] -> [B, L]; 0 where all blocks have the same attention.
    """
    centred = attention - attention.mean(1, keepdim=True)
    std = centred.std(1, keepdim=True)
    varies = std > 8 * torch.finfo(std.dtype).eps  # the neutral attention of a warm start does not, but for rounding
    return torch.where(varies, centred / std, torch.zeros_like(centred))
