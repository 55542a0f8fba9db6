"""The folder of a run: what is written after each epoch, and going on from there.

A checkpoint holds model, optimizer, EMA and loss scaler. Beside it, for each process, lies a small file with the random
number generators and the schedule, `resume-EPOCH-RANK.pth`. It is written first, and each file under another name that
then takes its place, so that a run killed at any point finds a checkpoint with all that belongs to it.
"""
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from ..common.errors import UserError, blame
from ..common.files import replacing
from ..common.summary import SUMMARY, metric_key, read_summary, trim_summary, write_row
from .checkpoints import Checkpoints, Kept, find_last

__all__ = ['RunFolder', 'load_resume_state', 'save_resume_state']

def _resume_path(run_dir: Path, epoch: int, rank: int) -> Path:
    return run_dir / f'resume-{epoch}-{rank}.pth'


def save_resume_state(run_dir: Path, epoch: int, rank: int, state: Dict[str, Any]) -> None:
    """Write what belongs to the checkpoint of an epoch; only this one and the one before are kept."""
    with replacing(_resume_path(run_dir, epoch, rank)) as temporary:
        torch.save(state, temporary)
    by_epoch = sorted(run_dir.glob(f'resume-*-{rank}.pth'), key=lambda path: int(path.name.split('-')[1]))
    for path in by_epoch[:-2]:
        path.unlink()


def load_resume_state(run_dir: Path, epoch: int, rank: int) -> Optional[Dict[str, Any]]:
    """What `save_resume_state` wrote for an epoch, None if there is nothing, as beside checkpoints of timm's script."""
    path = _resume_path(run_dir, epoch, rank)
    return torch.load(path, weights_only=True) if path.is_file() else None


class RunFolder:
    """Folder of one run.

    Args:
        path: The folder; made when the first file is written.
        rank: Process that writes. The first one writes all but its own resume state.
    """

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        self.rank = rank
        self.checkpoints: Optional[Checkpoints] = None  # of the first process, once `open` has been called

    def find_checkpoint(self, resume: str) -> Optional[Path]:
        """Checkpoint to go on from, None for a fresh start.

        Args:
            resume: A file, 'auto' for the last checkpoint of this folder, or empty.

        Raises:
            UserError: There is no such file, or the folder holds a run that would be written over.
        """
        checkpoint = None
        if resume == 'auto':
            checkpoint = find_last(self.path)
            if checkpoint is None:
                if len(read_summary(self.path)) > 1:  # else it was killed in its first epoch, or has not begun
                    raise UserError(f'--resume auto: {self.path} holds a run without a checkpoint that can be read')
                return None
        elif resume:
            checkpoint = Path(resume)
            if not checkpoint.is_file():
                raise UserError(f'--resume {checkpoint}: no such file')
        if (self.path / SUMMARY).exists() and not (checkpoint and self.holds(checkpoint)):
            raise UserError(
                f'--experiment {self.path.name}: {self.path} holds a run; --resume auto goes on with it')
        return checkpoint

    def holds(self, checkpoint: Path) -> bool:
        """True if a checkpoint lies in this folder."""
        return checkpoint.parent.resolve() == self.path.resolve()

    def open(self, checkpoints: Checkpoints, options: str, metric: str) -> None:
        """Begin to write, in the first process.

        Args:
            checkpoints: Of this folder.
            options: Text of args.yaml.
            metric: Metric of the best checkpoint.

        Raises:
            UserError: The folder cannot be written.
        """
        with blame(str(self.path), OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / 'args.yaml') as temporary:
                temporary.write_text(options)
        self.checkpoints = checkpoints
        self.metric = metric

    def go_on(self, start_epoch: int) -> None:
        """Bring the folder of a run that was killed at any point into the state right after one of its checkpoints."""
        trim_summary(self.path, start_epoch)
        rows = read_summary(self.path)
        kept = [Kept(int(row['epoch']), row[metric_key(row, self.metric)]) for row in rows]
        self.checkpoints.restore(kept[:-1])
        if kept and kept[-1].epoch == start_epoch - 1:
            # the run may have been killed before it had made copies of `last` and dropped a worse one
            self.checkpoints.rank(*kept[-1])

    def save_state(self, epoch: int, state: Dict[str, Any]) -> None:
        """Write what this process needs to go on behind an epoch. It comes before the checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_resume_state(self.path, epoch, self.rank, state)

    def save_epoch(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            learning_rate: float,
            content: Dict[str, Any],
    ) -> Dict[str, float]:
        """Write summary row and checkpoint of an epoch, in the first process.

        Args:
            epoch: Its index.
            train_metrics: Of training.
            eval_metrics: Of validation, None if there is none.
            learning_rate: Mean over the parameter groups.
            content: What the checkpoint holds.

        Returns:
            The row.
        """
        row: Dict[str, float] = dict(epoch=epoch)
        row.update({f'train_{name}': value for name, value in train_metrics.items()})
        row.update({f'eval_{name}': value for name, value in (eval_metrics or {}).items()}, lr=learning_rate)
        write_row(self.path, row)
        self.checkpoints.save(content, epoch, (eval_metrics or train_metrics)[self.metric])
        return row
