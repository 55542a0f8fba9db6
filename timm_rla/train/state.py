"""The small files beside the checkpoints of a run, one for each process: their names, writing, reading, checking."""
import re
import reprlib
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch

from ..common.errors import UserError, blame
from ..common.files import TEMPORARY, replacing
from ..common.trained import completed_epochs
from .recovery import Position

__all__ = [
    'RECOVERY', 'is_at', 'position_in', 'position_of', 'read_state', 'recovery_path', 'recovery_state_path',
    'resume_path', 'state_epoch', 'why_unusable', 'write_state',
]

RECOVERY = 'recovery'  # key in a checkpoint within an epoch: batches so far, and how the epoch is cut into batches


def resume_path(run_dir: Path, epoch: int, rank: int) -> Path:
    """State of a process behind an epoch."""
    return run_dir / f'resume-{epoch}-{rank}.pth'


def recovery_path(run_dir: Path, epoch: int, batches: int) -> Path:
    """Checkpoint behind some batches of an epoch, as timm names it."""
    return run_dir / f'recovery-{epoch}-{batches}.pth.tar'


def recovery_state_path(run_dir: Path, epoch: int, batches: int, rank: int) -> Path:
    """State of a process that belongs to it."""
    return run_dir / f'recovery-{epoch}-{batches}-{rank}.pth'


def position_of(path: Path) -> Optional[Tuple[int, int]]:
    """Epoch and batches of a file that is kept within an epoch, or a kill has left of one; None of other files."""
    numbers = re.fullmatch(r'recovery-(\d+)-(\d+)(\.pth\.tar|-\d+\.pth)', path.name.removesuffix(TEMPORARY))
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def position_in(content: Dict[str, Any], path: Path) -> Tuple[int, int]:
    """The same, as the content of a checkpoint within an epoch says it.

    Raises:
        UserError: What it says is no position.
    """
    recovery = content[RECOVERY]
    batches = recovery.get('batches') if isinstance(recovery, dict) else None
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise UserError(f'--resume {path}: damaged, its position in the epoch is {reprlib.repr(recovery)}')
    return completed_epochs(content, f'--resume {path}'), batches


def state_epoch(path: Path) -> int:
    """Epoch of a file `resume-EPOCH-RANK.pth`; -1 of other files."""
    number = re.fullmatch(r'resume-(\d+)-\d+\.pth', path.name)
    return int(number[1]) if number else -1


def write_state(path: Path, state: Dict[str, Any]) -> None:
    """Write what a process needs to go on, under another name that then takes its place."""
    with blame(str(path), OSError, RuntimeError), replacing(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path) -> Dict[str, Any]:
    """What `write_state` wrote; empty if there is none, as beside checkpoints of timm's script, or it is damaged."""
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # torch and pickle raise whatever a damaged file leads them to
        return {}
    return state if isinstance(state, dict) else {}


def is_at(state: Dict[str, Any], batches: int) -> bool:
    """True for the state of a process behind so many batches of an epoch."""
    try:
        return Position(**state['position']).batches == batches
    except (KeyError, TypeError):
        return False


def why_unusable(path: Path, content: Dict[str, Any], cut: Dict[str, Any]) -> str:
    """Why a run cannot go on from a checkpoint within an epoch; empty if it can, or if that is behind an epoch.

    Args:
        path: The checkpoint.
        content: What it holds.
        cut: Options of the run that say how an epoch is cut into batches, and its `processes`.

    Raises:
        UserError: It is damaged.
    """
    if RECOVERY not in content:
        return ''
    epoch, batches = position_in(content, path)
    found = content[RECOVERY]
    differ = [f'{name} {reprlib.repr(found.get(name))}, not {value}' for name, value in cut.items()
              if found.get(name) != value]
    if differ:
        return f'kept with {"; ".join(differ)}'
    for rank in range(cut['processes']):
        state = recovery_state_path(path.parent, epoch, batches, rank)
        if not is_at(read_state(state), batches):
            return f'{state.name} beside it is missing or damaged'
    return ''
