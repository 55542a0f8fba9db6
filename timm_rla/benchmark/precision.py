"""Numeric precisions by the names of timm's benchmark.py."""
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Optional

import torch

__all__ = ['PRECISIONS', 'Precision']


class Precision(NamedTuple):
    """Types in which a model computes."""
    dtype: torch.dtype  # of parameters and images
    autocast: Optional[torch.dtype] = None  # lower precision of mixed precision

    @property
    def features(self) -> torch.dtype:
        """Type of feature maps."""
        return self.autocast or self.dtype

    def context(self, device_type: str) -> AbstractContextManager:
        """Context of a forward pass on a device, 'cpu' or 'cuda'."""
        return torch.autocast(device_type, self.autocast) if self.autocast else nullcontext()


PRECISIONS = {
    'float32': Precision(torch.float32),
    'float16': Precision(torch.float16),
    'bfloat16': Precision(torch.bfloat16),
    'amp': Precision(torch.float32, torch.float16),
    'amp_bfloat16': Precision(torch.float32, torch.bfloat16),
}
