"""What a checkpoint says of the run that wrote it, as far as a stranger's file may say it.

Only plain values of the types that options have are taken, and of the model's arguments only those of its architecture:
nothing in a checkpoint opens a file or an address, or asks for more memory than its own weights.
"""
import argparse
import inspect
import logging
import math
import reprlib
from typing import Any, Callable, Dict, FrozenSet, Sequence, Type

import torch
import torch.nn as nn

from .errors import UserError
from .ranges import RANGES, check_ranges

__all__ = [
    'EPOCHS', 'NOT_ARCHITECTURE', 'architecture_arguments', 'check_sizes', 'completed_epochs', 'every', 'is_count',
    'is_number', 'is_text', 'training_options',
]

_logger = logging.getLogger(__name__)

DEPTH, LENGTH, TEXT = 4, 100_000, 10_000  # of plain values: nesting, entries, characters
EPOCHS = 10 ** 9
# Arguments of networks that other options set
NOT_ARCHITECTURE = {'self', 'args', 'kwargs', 'block', 'num_classes', 'in_chans', 'device', 'dtype'}


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    """True for what YAML could hold, of bounded size."""
    if isinstance(value, str):
        return len(value) <= TEXT
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if depth == 0 or not isinstance(value, (list, tuple, dict)) or len(value) > LENGTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry, depth - 1) for key, entry in value.items())
    return all(_is_plain(entry, depth - 1) for entry in value)


def is_count(value: Any) -> bool:
    """True for a number of things, of bounded size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LENGTH


def is_number(value: Any) -> bool:
    """True for a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """True for a text."""
    return isinstance(value, str)


def every(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check of lists by one of what is in them."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(check, value))


def _is_size(value: Any) -> bool:
    """True for a number of pixels, or channels, of which an image does not fill the memory."""
    return is_count(value) and RANGES['img_size'].holds(value)


EXPECTED: Dict[str, Callable[[Any], bool]] = {  # of options that later commands use; None is always accepted
    'model': is_text,
    'model_kwargs': lambda value: isinstance(value, dict),
    'num_classes': is_count,
    'in_chans': is_count,
    'img_size': _is_size,
    'input_size': lambda value: every(_is_size)(value) and len(value) == 3,
    'mean': every(is_number),
    'std': every(is_number),
    'crop_pct': is_number,
    'interpolation': is_text,
    'gp': is_text,
    'bn_eps': is_number,
    'label_names': every(is_text),
    'input_img_mode': is_text,
    'frozen_from': lambda value: (isinstance(value, dict) and is_text(value.get('model'))
                                  and isinstance(value.get('model_kwargs'), dict)),
}


def training_options(checkpoint: Dict[str, Any], source: str) -> Dict[str, Any]:
    """Options of the training run that wrote a checkpoint; empty if it is not of a training run.

    Args:
        checkpoint: As from `read_checkpoint`.
        source: Option and file, for the message.

    Raises:
        UserError: An option that commands use is not what it should be.
    """
    namespace = checkpoint.get('args')
    if not isinstance(namespace, argparse.Namespace) or not isinstance(getattr(namespace, 'model', None), str):
        return {}
    options = {key: value for key, value in vars(namespace).items() if isinstance(key, str) and _is_plain(value)}
    for key, expected in EXPECTED.items():
        value = getattr(namespace, key, None)
        if value is not None and not (key in options and expected(value)):
            raise UserError(f'{source}: damaged, its options have {key} {reprlib.repr(value)}')
    check_ranges({key: options[key] for key in EXPECTED if key in options}, source)
    return options


def completed_epochs(checkpoint: Dict[str, Any], source: str) -> int:
    """Epochs that a run had behind it when it wrote a checkpoint; 0 if it does not say.

    Raises:
        UserError: What stands there is no number of epochs.
    """
    epoch = checkpoint.get('epoch', -1)
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not -1 <= epoch < EPOCHS:
        raise UserError(f'{source}: damaged, its epoch is {reprlib.repr(epoch)}')
    return epoch + 1


def _arguments(network: Type[nn.Module]) -> FrozenSet[str]:
    """Names of the arguments that say how a network is built."""
    names = {
        name for cls in network.__mro__ if '__init__' in vars(cls) and cls not in (nn.Module, object)
        for name in inspect.signature(cls.__init__).parameters
    }
    return frozenset(names - NOT_ARCHITECTURE)


def architecture_arguments(model_kwargs: Dict[str, Any], network: Type[nn.Module], source: str) -> Dict[str, Any]:
    """Those of a checkpoint's model arguments that say how the network is built; says which are left out.

    Args:
        model_kwargs: From the options of a training run.
        network: Class of the model.
        source: Option and file, for the log.
    """
    known = _arguments(network)
    left_out = [name for name in model_kwargs if name not in known]
    if left_out:
        _logger.warning(f'{source}: model arguments that are left out, not of the architecture: '
                        f'{reprlib.repr(", ".join(left_out))}')
    return {name: value for name, value in model_kwargs.items() if name in known}


def check_sizes(model_kwargs: Dict[str, Any], weights: Dict[str, torch.Tensor], source: str) -> None:
    """Complain of model arguments that ask for more than there are weights.

    Args:
        model_kwargs: From the options of a training run.
        weights: Its state dict.
        source: Option and file, for the message.

    Raises:
        UserError: There is one.
    """
    largest = max([1000, *(weight.untyped_storage().nbytes() for weight in weights.values())])
    for name, value in model_kwargs.items():
        values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        whole = [number for number in values if isinstance(number, int)]
        limit = len(weights) if name == 'layers' else largest  # a block has some weights
        if any(abs(number) > limit for number in whole) or len(values) > len(weights):
            raise UserError(f'{source}: damaged, its model has {name} {reprlib.repr(value)}, its weights are smaller')
