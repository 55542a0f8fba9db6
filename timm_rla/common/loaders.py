"""Loaders of images: timm's own."""
from dataclasses import dataclass, replace
from typing import Any, Dict

from timm.data import create_loader

from .device import Placement
from .errors import blame

__all__ = ['LoaderSpec', 'create_eval_loader', 'load_batches']

PADDING_READERS = ('ReaderTfds', 'ReaderWds')  # timm's, of tfds/ and wds/ datasets; not importable without theirs


@dataclass(frozen=True)
class LoaderSpec:
    """How batches are loaded."""
    batch_size: int
    workers: int = 0
    pin_memory: bool = False
    prefetcher: bool = False  # normalise on the device


def load_batches(
        dataset: Any,
        spec: LoaderSpec,
        data_config: Dict[str, Any],
        placement: Placement,
        **kwargs: Any,
) -> Any:
    """timm's loader.

    Args:
        dataset: As from `open_dataset`.
        spec: Batches and workers.
        data_config: timm's data configuration of the network.
        placement: Where the images go.
        **kwargs: Further arguments of timm's `create_loader`.

    Raises:
        UserError: Values that it rejects.
    """
    with blame('data loader', AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError):
        return create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=spec.batch_size,
            mean=data_config['mean'],
            std=data_config['std'],
            num_workers=spec.workers,
            pin_memory=spec.pin_memory,
            img_dtype=placement.dtype,
            device=placement.device,
            distributed=placement.distributed,
            use_prefetcher=spec.prefetcher,
            persistent_workers=spec.workers > 0,  # timm's default, which before 1.0.29 failed without workers
            **kwargs,
        )


def create_eval_loader(
        dataset: Any,
        spec: LoaderSpec,
        data_config: Dict[str, Any],
        placement: Placement,
        **kwargs: Any,
) -> Any:
    """Loader for validation: resized, cropped in the centre, in order.

    For tfds/ and wds/ datasets it takes two workers at most in each of several processes: timm's readers pad their
    shares to the same length, the more so the more workers there are.

    Args, Raises:
        As `load_batches`.
    """
    reader = type(getattr(dataset, 'reader', None)).__name__
    if placement.distributed and reader in PADDING_READERS:
        spec = replace(spec, workers=min(2, spec.workers))
    return load_batches(
        dataset,
        spec,
        data_config,
        placement,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **kwargs,
    )
