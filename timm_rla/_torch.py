"""All that this package takes from torch's private parts, in one place."""
from typing import Optional

import torch
import torch.nn as nn
from torch.nn.modules import module as module_hooks

__all__ = ['in_plain_eager_mode', 'is_hooked', 'needs_operators', 'takes_autograd_functions']


def in_plain_eager_mode(x: torch.Tensor) -> bool:
    """Whether nothing but autograd looks on: no compiler or tracer, no functional transform, no tensor subclass."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def takes_autograd_functions(x: torch.Tensor) -> bool:
    """Whether an autograd function may have a tensor: in plain eager mode, and when compiled, but not exported."""
    if torch.compiler.is_compiling():
        # torch 2.5 and 2.6 cannot tell these two apart
        return hasattr(torch.compiler, 'is_exporting') and not torch.compiler.is_exporting()
    return in_plain_eager_mode(x)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes in or out of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def needs_operators(*grads: Optional[torch.Tensor]) -> bool:
    """Whether a backward pass is differentiated itself (create_graph=True) or takes a batch of gradients at once."""
    if torch.compiler.is_compiling():
        return False
    batched, legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or any(grad is not None and (batched(grad) or legacy(grad)) for grad in grads)
