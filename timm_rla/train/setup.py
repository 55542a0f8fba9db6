"""What training and validation set up alike: device, precision, model and checkpoint."""
import argparse
import difflib
import logging
import re
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict

import timm
import torch
import torch.nn as nn
from timm.models import create_model, load_checkpoint
from timm.utils import init_distributed_device, is_primary

from ..errors import UserError, blame

__all__ = [
    'build_autocast', 'build_model', 'describe_mismatch', 'load_weights', 'read_checkpoint_args', 'setup_device',
]

_logger = logging.getLogger(__name__)


def setup_device(args: argparse.Namespace) -> torch.device:
    """Device of this process; sets distributed, world_size, rank, local_rank and prefetcher in `args`."""
    args.prefetcher = not args.no_prefetcher
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    with blame(f'--device {args.device}'):
        device = init_distributed_device(args)
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UserError(f'--model-dtype {args.model_dtype}: --amp needs a model in float32')
    return device


def build_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """Context manager of the forward pass."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))


def build_model(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """Create the model that the options name.

    Args:
        args: Options `model` and `model_kwargs`.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        UserError: Unknown model or model argument, or a value that the model rejects.
    """
    name = args.model
    if not name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f'did you mean {" or ".join(close)}?' if close else "timm.list_models() lists the names"
        raise UserError(f'--model {name}: no such model; {hint}')
    with blame(f'--model {name}'):
        try:
            return create_model(name, **kwargs, **args.model_kwargs)
        except TypeError as e:
            argument = re.search(r"unexpected keyword argument '(\w+)'", str(e))
            if argument is None:
                raise
            raise UserError(
                f'--model-kwargs {argument.group(1)}: no such argument of {name}; networks with layer attention take '
                "context, context_dim, hidden_dim, reduction, attn_layer and the arguments of timm's ResNet") from e


def read_checkpoint_args(path: str) -> Dict[str, Any]:
    """Options of the training run that wrote a checkpoint; none if it does not say.

    Raises:
        UserError: The file is missing or damaged.
    """
    if path.endswith('.safetensors'):
        return {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError as e:
        raise UserError(f'--checkpoint {path}: no such file') from e
    except Exception as e:  # torch and pickle raise whatever a damaged file leads them to
        raise UserError(f'--checkpoint {path}: {describe_mismatch(e)}') from e
    return vars(checkpoint['args']) if isinstance(checkpoint, dict) and 'args' in checkpoint else {}


def load_weights(model: nn.Module, path: str, option: str, use_ema: bool = False) -> None:
    """Load a checkpoint of timm's or this package's training into a model of the same architecture.

    Raises:
        UserError: The file is missing or damaged, or its weights are not those of the model; says what differs.
    """
    try:
        load_checkpoint(model, path, use_ema=use_ema)
    except FileNotFoundError as e:
        raise UserError(f'{option} {path}: no such file') from e
    except Exception as e:  # torch and pickle raise whatever a damaged file leads them to
        raise UserError(f'{option} {path}: {describe_mismatch(e)}') from e


def describe_mismatch(error: Exception) -> str:
    """One line from torch's many when a state dict does not fit."""
    lines = [' '.join(line.split()) for line in str(error).splitlines()]
    kinds: Dict[str, str] = {}
    for line in lines[1:]:
        kind, _, rest = line.partition(':')
        if kind.startswith(('Missing key', 'Unexpected key')):
            keys = rest.strip(' .').split(', ')
            kinds[kind] = f'{"lacks" if kind.startswith("Missing") else "has too many"}: {_shorten(keys)}'
        elif kind.startswith('size mismatch for'):
            shapes = re.findall(r'torch\.Size\(\[([\d, ]*)\]\)', line)
            kinds.setdefault('size', f'{kind.split()[-1]} has shape [{shapes[0]}], the model [{shapes[-1]}]')
    if kinds:
        return 'weights of another network; ' + '; '.join(kinds.values())
    return lines[0] if lines else type(error).__name__


def _shorten(keys: list, limit: int = 3) -> str:
    shown = ', '.join(key.strip('"') for key in keys[:limit])
    return f'{shown} and {len(keys) - limit} more' if len(keys) > limit else shown
