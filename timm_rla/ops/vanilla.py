"""The one question that every fast form asks: may the module be left out and its formula be computed instead?"""
from typing import Callable, FrozenSet, Tuple, Type

import torch
import torch.nn as nn
from timm.layers import DropPath, SEModule

from .._torch import is_hooked

__all__ = ['is_vanilla']


def _describe(kind: Type[nn.Module]) -> Tuple[Callable, Callable, Callable, FrozenSet[str]]:
    """What a call of a module of this class runs, and the names of all methods."""
    methods = frozenset(name for name in dir(kind) if callable(getattr(kind, name)))
    return kind.__call__, kind._call_impl, kind.forward, methods


# Read at import, before anybody is likely to have patched these classes
_ORIGINALS = {kind: _describe(kind) for kind in (
    nn.BatchNorm2d, nn.Conv2d, nn.LSTMCell, nn.ReLU, nn.SyncBatchNorm, DropPath, SEModule)}


def is_vanilla(
        module: nn.Module,
        kind: Type[nn.Module],
        parameters: Tuple[Type[torch.Tensor], ...] = (nn.Parameter,),
) -> bool:
    """True if calling a module does what its class says and nothing else, so that nobody can miss the call.

    False for subclasses, hooked modules, any method replaced on the instance, `forward` or the call replaced on the
    class, and parameters that are not plain, materialised `nn.Parameter`s: pruned, parametrised, quantised, sharded,
    offloaded or swapped by `functional_call`. Such a module must be called.

    Args:
        module: Any module. Its submodules are not looked at.
        kind: The class that it must be an instance of.
        parameters: Types that its parameters may have.
    """
    if type(module) is not kind:
        return False
    call, call_impl, forward, methods = _ORIGINALS.get(kind) or _describe(kind)
    attributes = vars(module)
    return (
        kind.__call__ is call
        and kind._call_impl is call_impl
        and kind.forward is forward
        and methods.isdisjoint(attributes)
        and not any(isinstance(value, torch.Tensor) for value in attributes.values())  # in the place of a parameter
        and all(p is None or (type(p) in parameters and not p.is_meta) for p in module._parameters.values())
        and not is_hooked(module)
    )
