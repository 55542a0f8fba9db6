"""The one question that every fast form asks: may the module be left out and its formula be computed instead?"""
from typing import Callable, Dict, NamedTuple, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, SEModule

from .._torch import is_hooked

__all__ = ['is_vanilla']


class _Description(NamedTuple):
    """What a call of a module runs, if nobody has changed anything."""
    call: Callable
    call_impl: Callable
    forward: Callable
    function: Optional[Callable]  # of torch.nn.functional, which its forward calls
    reserved: Tuple[str, ...]  # names of methods and parameters, which an untouched instance does not have in __dict__


FUNCTIONS = {
    nn.BatchNorm2d: 'batch_norm', nn.Conv2d: 'conv2d', nn.ReLU: 'relu', nn.SyncBatchNorm: 'batch_norm',
}


def _describe(kind: Type[nn.Module], *parameters: str) -> _Description:
    own = kind.__mro__[:kind.__mro__.index(nn.Module)]
    methods = {name for base in own for name, value in vars(base).items() if callable(value)}
    return _Description(
        kind.__call__, kind._call_impl, kind.forward, _function(kind),
        tuple(sorted({'_call_impl', 'forward', *methods, *parameters})))


def _function(kind: Type[nn.Module]) -> Optional[Callable]:
    return getattr(F, FUNCTIONS[kind]) if kind in FUNCTIONS else None


# Read at import, before anybody is likely to have patched these classes
_DESCRIPTIONS: Dict[Type[nn.Module], _Description] = {kind: _describe(kind, *parameters) for kind, parameters in {
    nn.BatchNorm2d: ('weight', 'bias'),
    nn.Conv2d: ('weight', 'bias'),
    nn.Identity: (),
    nn.LSTMCell: ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'),
    nn.ReLU: (),
    nn.Sequential: (),
    nn.SyncBatchNorm: ('weight', 'bias'),
    DropPath: (),
    SEModule: (),
}.items()}


def is_vanilla(
        module: nn.Module,
        kind: Type[nn.Module],
        parameters: Tuple[Type[torch.Tensor], ...] = (nn.Parameter,),
) -> bool:
    """True if calling a module does what its class says and nothing else, so that nobody can miss the call.

    False for subclasses, hooked modules, a method replaced on the instance, `forward` or the call replaced on the
    class, their function replaced in torch.nn.functional, and parameters that are not plain, materialised
    `nn.Parameter`s: pruned, parametrised, quantised, sharded, offloaded or swapped by `functional_call`. Such a module
    must be called.

    Args:
        module: Any module. Its submodules are not looked at.
        kind: The class that it must be an instance of.
        parameters: Types that its parameters may have.
    """
    if type(module) is not kind:
        return False
    original = _DESCRIPTIONS.get(kind) or _describe(kind)
    return (
        kind.__call__ is original.call
        and kind._call_impl is original.call_impl
        and kind.forward is original.forward
        and _function(kind) is original.function
        and not any(name in module.__dict__ for name in original.reserved)  # vars() cannot be compiled by torch 2.5
        and callable(module.forward)  # reading it makes torch.compile guard that nobody replaces it later
        and all(p is None or (type(p) in parameters and not p.is_meta) for p in module._parameters.values())
        and not is_hooked(module)
    )
