"""What training and validation set up alike: device, precision, model and checkpoint."""
import argparse
import re
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Tuple

import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import clean_state_dict, create_model
from timm.utils import init_distributed_device

from ..errors import UserError, blame, closest

__all__ = [
    'build_autocast', 'build_model', 'describe_mismatch', 'input_channels', 'load_weights', 'place_batch',
    'read_checkpoint', 'setup_device',
]


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


def place_batch(
        images: torch.Tensor,
        target: torch.Tensor,
        args: argparse.Namespace,
        device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Bring a batch to the device, in the layout and precision of the options, as far as the loader has not."""
    if not args.prefetcher:
        images = images.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32'))
        target = target.to(device=device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, target


def input_channels(args: argparse.Namespace) -> int:
    """Input channels that the options ask for, 3 if they do not."""
    return args.in_chans if args.in_chans is not None else args.input_size[0] if args.input_size else 3


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
        raise UserError(f'--model {name}: no such model (timm.list_models() lists them); '
                        f'{closest(name, timm.list_models())}')
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


def read_checkpoint(path: str, option: str) -> Dict[str, Any]:
    """Read a checkpoint of timm's or this package's training, or a bare state dict, without running code in it.

    Args:
        path: The file, .safetensors or of `torch.save`.
        option: Option that named it.

    Returns:
        Mapping with `state_dict` and whatever else a training checkpoint holds.

    Raises:
        UserError: The file is missing, damaged or not a checkpoint.
    """
    try:
        if path.endswith('.safetensors'):
            return dict(state_dict=load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options, in checkpoints of training
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f'{option} {path}: no such file') from e
    except Exception as e:  # torch and pickle raise whatever a damaged file leads them to
        raise UserError(f'{option} {path}: {" ".join(str(e).split()) or type(e).__name__}') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'{option} {path}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint if 'state_dict' in checkpoint else dict(state_dict=checkpoint.get('model', checkpoint))


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], source: str, use_ema: bool = False) -> None:
    """Load the weights of a checkpoint into a model of the same architecture.

    Args:
        model: Not wrapped by DDP or torch.compile.
        checkpoint: As from `read_checkpoint`.
        source: Option and file, for the message.
        use_ema: Take the EMA weights if there are any.

    Raises:
        UserError: The weights are not those of the model; says what differs.
    """
    state_dict = use_ema and checkpoint.get('state_dict_ema') or checkpoint['state_dict']
    try:
        model.load_state_dict(clean_state_dict(state_dict))
    except (RuntimeError, TypeError, AttributeError) as e:
        raise UserError(f'{source}: {describe_mismatch(e)}') from e


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
