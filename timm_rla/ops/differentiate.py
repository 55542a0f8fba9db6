"""Backward passes of formulas, for autograd functions whose own is written by hand."""
from typing import Callable, List, Optional, Sequence

import torch

__all__ = ['differentiate']


def differentiate(
        formula: Callable[..., Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        grads: Sequence[Optional[torch.Tensor]],
) -> List[Optional[torch.Tensor]]:
    """Backward pass of a formula by torch's own operators, which may be differentiated again or take a batch.

    Args:
        formula: Function of the inputs.
        inputs: Tensors.
        grads: Gradients of what the formula returns.

    Returns:
        Gradients of the inputs, None for those that want none.
    """
    if not any(x.requires_grad for x in inputs):
        return [None] * len(inputs)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x.view_as(x) for x in inputs]  # which do not depend on each other
        pairs = [pair for pair in zip(formula(*inputs), grads) if pair[0].requires_grad and pair[1] is not None]
        outputs, grads = zip(*pairs)
        wanted = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True)
    by_input = iter(found)
    return [next(by_input) if x.requires_grad else None for x in inputs]
