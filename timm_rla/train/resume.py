"""What a run takes from the checkpoint that it goes on from: weights, their EMA, and the state of the optimizer."""
import argparse
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm import utils

from ..common.checkpoint import load_weights, read_checkpoint
from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.optimizers import HYPERPARAMETERS, is_same_optimizer
from ..common.trained import completed_epochs, training_options
from .folder import RunFolder
from .loop import STATE_ERRORS

__all__ = ['restore_weights']

_logger = logging.getLogger(__name__)

FACTORED = ('_r', '_c', '_row', '_col')  # ends of names of state that has one dimension averaged out


def restore_weights(
        args: argparse.Namespace,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[utils.NativeScaler],
        checkpoint: Optional[Path],
        folder: RunFolder,
        place: Placement,
) -> Tuple[int, Dict[str, Any], Optional[utils.ModelEmaV3]]:
    """Load weights and optimizer of a checkpoint, in place; nothing is loaded without one.

    Args:
        args: Options of the run.
        model: Not compiled or wrapped.
        optimizer: Of the run.
        loss_scaler: Of mixed precision, if there is one.
        checkpoint: The file, None for a run that begins.
        folder: Of the run.
        place: Where the model is.

    Returns:
        Epoch that the run begins with, what this process has left beside the checkpoint, and the EMA of the weights,
        if there is one.

    Raises:
        UserError: The checkpoint is damaged, or of another network, other classes or another optimizer.
    """
    source, content, state = f'--resume {checkpoint}', {}, {}
    if checkpoint is not None:
        content = read_checkpoint(str(checkpoint), '--resume')
        _check_classes(content, args.label_names, source)
        load_weights(model, content, source)
        if not args.no_resume_opt:
            _load_optimizer(content, source, optimizer, args.opt, loss_scaler, verbose=place.primary)
    start_epoch = completed_epochs(content, source) if args.start_epoch is None else args.start_epoch
    if checkpoint is not None and start_epoch == completed_epochs(content, source):
        state = folder.resume_state(checkpoint, content, start_epoch)
        seed = training_options(content, source).get('seed')
        if state and seed not in (None, args.seed) and place.primary:
            _logger.warning(f'--seed {args.seed}: {source} was trained with seed {seed}, whose random numbers go on '
                            'where they are kept; this run is that of neither seed')
    model_ema = None
    if args.model_ema:
        model_ema = utils.ModelEmaV3(
            model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
            device='cpu' if args.model_ema_force_cpu else None)
        if content:
            load_weights(model_ema.module, content, source, use_ema=True)
    return start_epoch, state, model_ema


def _check_classes(checkpoint: Dict[str, Any], names: Optional[List[str]], source: str) -> None:
    """Complain of a checkpoint of other classes: its classifier would take on the names of these."""
    trained = training_options(checkpoint, source).get('label_names')
    if names and trained and list(trained) != list(names):
        of, own = (', '.join(entry for entry in entries if entry not in others) or 'the same names in another order'
                   for entries, others in ((trained, names), (names, trained)))
        raise UserError(f'{source}: trained on other classes than those of the data: {of[:200]}, not {own[:200]}')


def _load_optimizer(
        checkpoint: Dict[str, Any],
        source: str,
        optimizer: torch.optim.Optimizer,
        name: str,
        loss_scaler: Optional[utils.NativeScaler],
        verbose: bool = False,
) -> None:
    """Load what a checkpoint holds of the optimizer, and of the loss scaler if there is one.

    Args:
        checkpoint: As from `read_checkpoint`; without a state of the optimizer nothing is loaded.
        source: Option and file, for messages.
        optimizer: Changed in place. Its weight decay, momentum and the like become those of the checkpoint.
        name: Its name.
        loss_scaler: Changed in place.
        verbose: Say which options the checkpoint overrules.

    Raises:
        UserError: State of another optimizer, or that does not fit the weights.
    """
    errors = f'{source}: state of the optimizer'
    if 'optimizer' in checkpoint:
        trained = training_options(checkpoint, source).get('opt')
        if isinstance(trained, str) and not is_same_optimizer(trained, name):
            raise UserError(f'--opt {name}: {source} was trained with {trained}; --no-resume-opt begins its state anew')
        given = [dict(group) for group in optimizer.param_groups]
        with blame(errors, *STATE_ERRORS):
            optimizer.load_state_dict(checkpoint['optimizer'])
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if torch.is_tensor(value) and not _fits(value, parameter, key.endswith(FACTORED)):
                        raise ValueError(f'{key} of shape {list(value.shape)} for weights {list(parameter.shape)}')
            differ = {key for old, new in zip(given, optimizer.param_groups)
                      for key in HYPERPARAMETERS & old.keys() if old[key] != new.get(key)}
        if differ and verbose:
            _logger.warning(f'{source} goes on with its own {", ".join(sorted(differ))}, not those of the options; '
                            '--no-resume-opt begins the state of the optimizer anew, with these')
    if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
        with blame(errors, *STATE_ERRORS):
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])


def _fits(value: torch.Tensor, parameter: torch.Tensor, factored: bool) -> bool:
    """True for state of an optimizer that may belong to a parameter: of its shape, factored, or of another kind."""
    if value.ndim != parameter.ndim or value.ndim == 0:
        return True
    return all(own == size or factored and own == 1 for own, size in zip(value.shape, parameter.shape))
