"""Train with attention, deploy without: a network with constant attentions is timm's plain network with other norms.

The warm start backwards. If block l always scales its branch by the same a_l, then a_l can be multiplied into weight
and bias of its last norm, and nothing is left of layer attention. An intra-layer attention inside the block then sees
a_l A_l instead of A_l: the weights of its first, linear, layer are divided by a_l.
"""
from typing import Any, Dict

import timm
import torch
import torch.nn as nn
from timm.models import filter_pretrained_cfg

from .network import RecurrentBlock, RecurrentLayerAttention
from .warm_start import INPUT_WEIGHTS, differing_keys, is_added, last_norm, plain_name, scaled_keys

__all__ = ['plain_arguments', 'plain_network']

ARGUMENTS = ('context', 'context_dim', 'hidden_dim', 'reduction', 'vector')  # of layer attention
LOADING = (  # of timm.create_model: which weights and data configuration there are at first
    'cache_dir', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict',
)


def plain_arguments(name: str, model_kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of the network without layer attention, from those of the RLA network.

    Args:
        name: As from `plain_name`.
        model_kwargs: Arguments of the RLA network.
    """
    kwargs = {key: value for key, value in model_kwargs.items()
              if key not in ARGUMENTS + LOADING and value is not None}  # as timm, which leaves out None
    if 'attn_layer' in kwargs and not name.endswith('_cifar'):  # timm's ResNet takes it as an argument of its blocks
        kwargs['block_args'] = dict(kwargs.get('block_args') or {}, attn_layer=kwargs.pop('attn_layer'))
    return kwargs


def plain_network(
        model: nn.Module,
        attention: Dict[str, torch.Tensor],
        **model_kwargs: Any,
) -> nn.Module:
    """timm's plain network that returns what an RLA network returns with constant attentions.

    Args:
        model: RLA network, not folded.
        attention: Attention of each block by its name, such as 'layer1.0': [1], or [C] of RLA-vector; in (0, 1).
        **model_kwargs: Arguments that the network was created with; those of layer attention are left out.

    Returns:
        timm's network of the same depth, in eval mode, with the type, the device and the data configuration of `model`.

    Raises:
        ValueError: Another kind of network, a block without attention, one that is wrapped or cannot be rescaled, or
            other arguments than the network was created with.
    """
    if not isinstance(model, RecurrentLayerAttention):
        raise ValueError(f'{type(model).__name__} has no layer attention to freeze; networks named rla_* have')
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is None:
        raise ValueError('the network has no pretrained_cfg, which says its name; timm.create_model gives it one')
    name = plain_name(cfg['architecture'])
    kwargs = plain_arguments(name, model_kwargs)
    kwargs.setdefault('num_classes', model.fc.out_features if isinstance(model.fc, nn.Linear) else model.num_classes)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    kwargs.setdefault('in_chans', first.in_channels)
    pool = getattr(model.global_pool, 'pool_type', None)  # None of one that was replaced
    if pool is not None:
        kwargs.setdefault('global_pool', pool)
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # the weights are replaced; random numbers go on as without this
        plain = timm.create_model(name, **kwargs).to(device=reference.device, dtype=reference.dtype)
    state = {key: value.clone() for key, value in model.state_dict().items() if not is_added(key)}
    try:
        plain.load_state_dict(state)
    except RuntimeError as e:
        differences = differing_keys(state.keys(), plain.state_dict().keys()) or _other_weights(state, plain)
        raise ValueError(
            f'{name} with the arguments {kwargs} is not the network without attention ({differences}); give those that '
            f'the network was created with, and it as it was created: not folded, pruned or parametrised') from e
    names = {block_name for block_name, _ in plain.named_modules()}
    for block_name, block in model.named_modules():
        if isinstance(block, RecurrentBlock):
            if block_name not in attention:
                raise ValueError(f'no attention for block {block_name}; there is one for {", ".join(attention)}')
            if block_name not in names:
                raise ValueError(f'block {block_name} is wrapped; give the network without wrappers')
            _absorb(state, block_name, block, attention[block_name])
    plain.load_state_dict(state)
    plain.pretrained_cfg = plain.default_cfg = dict(
        filter_pretrained_cfg(cfg, remove_source=True), architecture=name, tag=None)
    return plain.eval()


def _other_weights(state: Dict[str, torch.Tensor], plain: nn.Module) -> str:
    """The first weight, such as one of the classifier, that the plain network has not or has in another shape."""
    expected = plain.state_dict()
    key = next(key for key in [*state, *expected]
               if key not in state or key not in expected or state[key].shape != expected[key].shape)
    shapes = [f'has shape {list(weights[key].shape)}' if key in weights else 'is missing'
              for weights in (state, expected)]
    return f'{key} {shapes[0]}, there it {shapes[1]}'


def _absorb(state: Dict[str, torch.Tensor], name: str, block: RecurrentBlock, attention: torch.Tensor) -> None:
    if not (attention.isfinite().all() and (block.se is None or (attention > 0).all())):
        raise ValueError(f'the attention of block {name} is {attention.min():.3g}; it must be above 0 and finite')
    for key in scaled_keys(state, f'{name}.{last_norm(block)}'):
        state[key] = (state[key].double() * attention.double()).to(state[key].dtype)
    if block.se is None:
        return
    weight = INPUT_WEIGHTS.get(type(block.se))
    if weight is None:
        raise ValueError(f'{type(block.se).__name__} inside the blocks cannot be rescaled; what can is '
                         f'{", ".join(module.__name__ for module in INPUT_WEIGHTS)}')
    weight = f'{name}.se.{weight}'
    if attention.numel() > 1 and state[weight].shape[1] == 1:
        raise ValueError(f'{type(block.se).__name__} inside the blocks cannot be rescaled channel by channel')
    scale = attention.double().reshape(1, -1, *[1] * (state[weight].ndim - 2))  # inputs are in dimension 1
    state[weight] = (state[weight].double() / scale).to(state[weight].dtype)
