"""All that this package takes from torch's private parts, in one place."""
import torch
import torch.nn as nn
from torch.nn.modules import module as module_hooks

__all__ = ['graph_task', 'in_plain_eager_mode', 'is_hooked']


def in_plain_eager_mode(x: torch.Tensor) -> bool:
    """Whether nothing but autograd looks on: no compiler or tracer, no functional transform, no tensor subclass."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


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


def graph_task() -> int:
    """Number of the backward pass that runs just now."""
    return torch._C._current_graph_task_id()
