"""What this package uses of torch's private API, but for what `analysis/hooks.py` and `ops/vanilla.py` look at."""
from typing import Optional

import torch
import torch.nn as nn
from torch.nn.modules import module as global_hooks
from torch.utils._device import DeviceContext

__all__ = [
    'comes_from_reentrant_checkpoint', 'has_bfloat16', 'in_functorch_transform', 'in_plain_eager_mode', 'is_hooked',
    'needs_operators',
]


def comes_from_reentrant_checkpoint(x: torch.Tensor) -> bool:
    """True for what torch.utils.checkpoint returns with use_reentrant=True, in eager mode."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(x, torch.Tensor)  # no proxy of torch.fx
        and type(x.grad_fn).__name__ == 'CheckpointFunctionBackward'
    )


def has_bfloat16() -> bool:
    """True if convolutions and matrix products in bfloat16 have fast kernels on this CPU."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_functorch_transform() -> bool:
    """True under torch.func's vmap, grad and the like."""
    return torch._C._are_functorch_transforms_active()


def in_plain_eager_mode(x: torch.Tensor) -> bool:
    """True in ordinary eager execution.

    False when compiled or traced, in a functorch transform or forward AD, for a tensor subclass, and under a
    TorchFunctionMode, which sees, and may replace, calls such as torch.nn.functional.batch_norm. Under a
    TorchDispatchMode it stays True: that sees the operators that run.
    """
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_functorch_transform()
        and not _in_forward_ad()
        and not _in_function_mode()
    )


def _in_forward_ad() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _in_function_mode() -> bool:
    """True under any TorchFunctionMode but that of a default device."""
    stack = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in stack)


def is_hooked(module: nn.Module) -> bool:
    """True if any module or global hook is registered that a call of this module would run."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )


def needs_operators(*grads: Optional[torch.Tensor]) -> bool:
    """True if a backward pass is itself differentiated (create_graph=True, forward AD) or gets a batch of gradients."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or _in_forward_ad():
        return True
    batched, legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(grad is not None and (batched(grad) or legacy(grad)) for grad in grads)
