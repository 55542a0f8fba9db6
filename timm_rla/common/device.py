"""Where a model runs, in which precision and layout, and as which of several processes."""
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple, Type

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.utils.distributed import init_distributed_device_so

from .._torch import has_bfloat16
from .errors import UserError, blame

__all__ = [
    'MEMORY_ERRORS', 'NETWORK_ERRORS', 'Placement', 'check_device', 'default_device', 'default_workers',
    'mixed_precision', 'place',
]

MEMORY_ERRORS = (MemoryError, torch.cuda.OutOfMemoryError)
# What networks raise for images that they cannot take, or labels, and for lack of memory
NETWORK_ERRORS = (*MEMORY_ERRORS, AssertionError, IndexError, RuntimeError, ValueError)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Device, precision and layout of a model and its images, and the place of this process among all."""
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the model and of images
    autocast_dtype: Optional[torch.dtype] = None  # lower precision of mixed precision
    channels_last: bool = False
    distributed: bool = False
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def primary(self) -> bool:
        """True in the process that prints and writes for all."""
        return self.rank == 0

    def place_model(self, model: nn.Module) -> nn.Module:
        """Move a model, in place."""
        model.to(device=self.device, dtype=self.dtype)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def place_batch(self, images: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Move a batch, as far as the loader has not."""
        images, target = images.to(device=self.device, dtype=self.dtype), target.to(device=self.device)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images, target

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass."""
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def blame(
            self,
            images: torch.Tensor,
            errors: Sequence[Type[Exception]] = NETWORK_ERRORS,
    ) -> AbstractContextManager:
        """Context in which what a network raises for images that it cannot take, or for lack of memory, is a UserError.

        Args:
            images: [B, in_chans, H, W]
            errors: What it raises.
        """
        if self.distributed:  # a RuntimeError may say that another process has failed, and why is said there
            errors = [error for error in errors if error is not RuntimeError]
        return blame(f'images {list(images.shape)} on {self.device}', *errors)

    def gather(self, items: List[Any]) -> List[Any]:
        """Items of all processes, in the order of their ranks; the same list in each process."""
        if not self.distributed:
            return items
        parts: List[Any] = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]


def default_device() -> str:
    """'cuda' where there is a GPU, else 'cpu'."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def default_workers() -> int:
    """Processes that load data: 4 as in timm, or as many as there are processors if they are fewer."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


def check_device(device: str) -> None:
    """Complain of a device that this machine does not have.

    Raises:
        UserError: It has none of that name.
    """
    here = [f'{kind}:{index}' for kind in ('cuda', 'mps', 'xpu') for index in range(_count(kind))]
    if device.startswith('cuda') and not here:
        raise UserError(f'--device {device}: PyTorch finds no CUDA GPU here; --device cpu runs without one')
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or (found.index or 0) >= _count(found.type):
        known = ', '.join(['cpu', *here])
        raise UserError(f'--device {device or repr(device)}: no such device here; there are {known}')


def _count(kind: str) -> int:
    """Devices of a kind on this machine."""
    module = getattr(torch, kind, None)
    return module.device_count() if hasattr(module, 'device_count') else 0


def mixed_precision(dtype: str, device: str) -> str:
    """The lower precision of mixed precision: that asked for; on a CPU never float16, which is slow there, and said."""
    if not device.startswith('cpu'):
        return dtype
    if dtype == 'float16':
        _logger.info('--amp: in bfloat16; float16, the default, takes minutes for a step on a CPU')
    if not has_bfloat16():
        _logger.warning('--amp: this CPU has no instructions for bfloat16; without --amp it is many times faster')
    return 'bfloat16'


def place(
        device: str,
        model_dtype: Optional[str] = None,
        amp_dtype: Optional[str] = None,
        channels_last: bool = False,
) -> Placement:
    """Set up the device of this process and, under torchrun, the process group.

    Args:
        device: Device, as timm names it.
        model_dtype: Name of the model's own dtype, float32 if None.
        amp_dtype: Name of the lower precision of mixed precision, none if None, as `mixed_precision` takes it.
        channels_last: Use the channels_last memory layout.

    Raises:
        UserError: There is no such device, or mixed precision is asked for with a model that is not in float32.
    """
    if amp_dtype and model_dtype not in (None, 'float32'):
        raise UserError(f'--model-dtype {model_dtype}: --amp needs a model in float32')
    check_device(device)
    if torch.cuda.is_available():  # as timm's scripts
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if amp_dtype:
        amp_dtype = mixed_precision(amp_dtype, device)
    with blame(f'--device {device}', AssertionError, RuntimeError, ValueError):
        found = init_distributed_device_so(device)
    return Placement(
        torch.device(found['device']),
        getattr(torch, model_dtype or 'float32'),
        getattr(torch, amp_dtype) if amp_dtype else None,
        channels_last,
        found['distributed'],
        found['world_size'],
        found['global_rank'],
        found['local_rank'],
    )
