"""Reading checkpoints without running code in them, and loading their weights."""
import argparse
import errno
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.models import clean_state_dict

from .errors import UserError, blame, one_line
from .files import file_digest

__all__ = ['describe_mismatch', 'load_weights', 'read_checkpoint', 'weights_id']


WEIGHTS = ('state_dict', 'state_dict_ema')


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
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f'{option} {path}: no plain file')  # whoever opens a pipe may wait for ever
    try:
        if path.endswith('.safetensors'):
            return dict(state_dict=load_file(path))
        _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options, in checkpoints of training
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f'{option} {path}: no such file') from e
    except IsADirectoryError as e:
        raise UserError(f'{option} {path}: is a folder{_offer(Path(path))}') from e
    except Exception as e:  # torch and pickle raise whatever a damaged file leads them to, and advise to run its code
        if isinstance(e, (OSError, MemoryError)) and getattr(e, 'errno', 0) != errno.EINVAL:  # sought before its start
            raise UserError(f'{option} {path}: {one_line(e)}') from e
        raise UserError(f'{option} {path}: no checkpoint, damaged, or with code in it, which is never run') from e
    if not isinstance(checkpoint, dict):
        raise UserError(f'{option} {path}: holds a {type(checkpoint).__name__}, not a checkpoint')
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint.get('model', checkpoint))
    for key in WEIGHTS:
        if not _is_state_dict(checkpoint.get(key, {})):
            raise UserError(f'{option} {path}: no checkpoint, or damaged: no weights in {key}')
    return checkpoint


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())


def _check_archive(path: str) -> None:
    """Complain of a file of `torch.save` that is packed: a small one could fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError('packed')


def _offer(folder: Path) -> str:
    """The checkpoint in a folder that is meant, as the end of a message."""
    names = ('last.pth.tar', 'model_best.pth.tar', 'model.safetensors', 'pytorch_model.bin')
    found = [name for name in names if (folder / name).is_file()]
    if 'model.safetensors' in found and (folder / 'config.json').is_file():
        return f' for --model local-dir:{folder}'
    return f'; did you mean {folder / found[0]}?' if found else ' without a checkpoint'


def weights_id(path: Path, use_ema: bool = False) -> str:
    """What tells the weights of a checkpoint from those of another, such as in a picture of them.

    Args:
        path: The file.
        use_ema: Its EMA weights.

    Raises:
        UserError: It cannot be read.
    """
    with blame(str(path), OSError):
        return file_digest(path) + ' EMA' * use_ema


def load_weights(
        model: nn.Module,
        checkpoint: Dict[str, Any],
        source: str,
        use_ema: bool = False,
        assign: bool = False,
        filter_fn: Optional[Callable[[Dict[str, torch.Tensor], nn.Module], Dict[str, torch.Tensor]]] = None,
) -> None:
    """Load the weights of a checkpoint into a model of the same architecture.

    Args:
        model: Not wrapped by DDP or torch.compile.
        checkpoint: As from `read_checkpoint`.
        source: Option and file, for the message.
        use_ema: Take the EMA weights if there are any.
        assign: Take the tensors themselves, as for a model on the meta device.
        filter_fn: Turns weights of another kind into those of the model, as timm's functions of this name do.

    Raises:
        UserError: The weights are not those of the model, which says what differs, or not finite.
    """
    state_dict = clean_state_dict(use_ema and checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
    try:
        model.load_state_dict(filter_fn(state_dict, model) if filter_fn else state_dict, assign=assign)
    except (AttributeError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{source}: {describe_mismatch(e)}') from e
    for name, weight in state_dict.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(f'{source}: weights that are not finite, first in {name}')


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


def _shorten(keys: List[str], limit: int = 3) -> str:
    shown = ', '.join(key.strip('"') for key in keys[:limit])
    return f'{shown} and {len(keys) - limit} more' if len(keys) > limit else shown
