"""Which checkpoint a run of a detector goes on from, and whether it is one of such a run."""
import argparse
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from ..common.checkpoint import read_checkpoint
from ..common.errors import UserError, blame
from ..common.optimizers import is_same_optimizer
from ..common.summary import SUMMARY
from .checkpoint import describe, find_last, iterations
from .module import Detection

__all__ = ['find_checkpoint', 'holds']


def find_checkpoint(args: argparse.Namespace, folder: Path, module: Detection) -> Tuple[Optional[Path], int]:
    """The checkpoint to go on from, and the iterations before it.

    Args:
        args: `resume`, a file, 'auto' for the last one in the folder, or empty; and what must be as it was, the
            optimizer and whether weights are averaged.
        folder: Folder of the run.
        module: The detector; the checkpoint must be of one like it.

    Raises:
        UserError: It cannot be read or is of another detector, or the folder holds a run, and it is not one of its
            checkpoints.
    """
    resume = args.resume
    if resume == 'auto':
        path, checkpoint = find_last(folder)
    else:
        if (any(folder.glob('*.ckpt')) or (folder / SUMMARY).exists()) and not (resume and holds(folder, resume)):
            raise UserError(f'--experiment {folder}: holds a run; --resume auto goes on with it')
        if not resume:
            return None, 0
        path, checkpoint = Path(resume), read_checkpoint(resume, '--resume')
    if path is None:
        if any(folder.glob('*.ckpt')):
            raise UserError(f'--resume auto: no checkpoint in {folder} can be read')
        return None, 0
    found, description = describe(checkpoint, f'--resume {path}'), module.description
    for key in [*description, *found]:
        if _as_lists(found.get(key)) != _as_lists(description.get(key)):
            raise UserError(
                f'--resume {path}: of a detector with {key} {found.get(key)!r}, not {description.get(key)!r}')
    trained = str(checkpoint.get('opt', args.opt))
    if not is_same_optimizer(trained, args.opt):
        raise UserError(f'--opt {args.opt}: --resume {path} was trained with {trained}')
    before, now = _count_trained(checkpoint, str(path)), sum(p.requires_grad for p in module.detector.parameters())
    if before != now:
        raise UserError(f'--trainable-layers: --resume {path} trained {before} parameters, not {now}')
    if 'current_model_state' in checkpoint and not args.model_ema:  # Lightning's, beside averaged weights
        raise UserError(f'--model-ema: not given, --resume {path} was trained with it')
    return path, iterations(checkpoint, f'--resume {path}')


def _count_trained(checkpoint: Dict[str, Any], source: str) -> int:
    """Parameters that the optimizer of a checkpoint has trained."""
    with blame(f'--resume {source}: state of the optimizer', AttributeError, LookupError, TypeError):
        return sum(len(group['params']) for group in checkpoint['optimizer_states'][0]['param_groups'])


def _as_lists(value: Any) -> Any:
    """A value with lists for tuples: recipes have those where the command line has these."""
    if isinstance(value, dict):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value


def holds(folder: Path, checkpoint: str) -> bool:
    """True if a checkpoint lies in a folder."""
    return Path(checkpoint).parent.resolve() == folder.resolve()
