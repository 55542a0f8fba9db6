"""The optimizer's state from a checkpoint."""
import logging
from typing import Any, Dict, Optional

import torch
from timm import utils

from ..common.errors import UserError, blame
from ..common.optimizers import is_same_optimizer
from ..common.trained import training_options
from .loop import STATE_ERRORS

__all__ = ['load_optimizer']

_logger = logging.getLogger(__name__)

KEPT = {'weight_decay', 'momentum', 'betas', 'eps', 'nesterov'}  # of an optimizer, which loading its state sets
FACTORED = ('_r', '_c', '_row', '_col')  # ends of names of state that has one dimension averaged out


def load_optimizer(
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
                      for key in KEPT & old.keys() if old[key] != new.get(key)}
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
