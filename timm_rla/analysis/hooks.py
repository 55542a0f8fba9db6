"""Models for a while: with forward hooks, which leave nothing behind, run eagerly, in eval mode."""
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator

import torch
import torch.nn as nn

__all__ = ['eval_mode', 'hooked', 'run_eagerly']

Hook = Callable[[nn.Module, Any, Any], Any]


@contextmanager
def hooked(model: nn.Module, hooks: Dict[nn.Module, Hook]) -> Iterator[None]:
    """Have forward hooks on some of a model's modules, and the model run eagerly.

    Args:
        model: The model that will be called, as it is: compiled, wrapped or neither.
        hooks: Modules and their forward hooks; what a hook returns, unless None, replaces the module's output.
    """
    with ExitStack() as stack:
        stack.enter_context(run_eagerly(model))
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Set compiled code aside: it was traced without the hooks that came after it, and would not call them."""
    if hasattr(torch.compiler, 'set_stance'):  # torch 2.6
        with torch.compiler.set_stance('force_eager'):
            yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            if '_orig_mod' in module._modules:  # torch.compile(module)
                stack.callback(setattr, module, 'forward', module.forward)
                module.forward = module._orig_mod.__call__
            if module._compiled_call_impl is not None:  # module.compile()
                stack.callback(setattr, module, '_compiled_call_impl', module._compiled_call_impl)
                module._compiled_call_impl = None
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module has its own mode again, since parts of a model may be frozen."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
