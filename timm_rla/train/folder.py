"""The folder of a run: what is written after each epoch, and going on from there.

A checkpoint of timm holds model, optimizer, EMA and loss scaler. Beside it, for each process, lies a small file with
the random number generators and the schedule, `resume-EPOCH-RANK.pth`. It is written first, and each file under
another name that is then replaced, so that a run killed at any point finds a checkpoint with all that belongs to it.
"""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm import utils

from .._timm import file_checkpoint
from ..common.errors import UserError
from ..common.files import replacing
from ..common.summary import SUMMARY, best_row, metric_key, read_summary, trim_summary

__all__ = ['RunFolder', 'find_last', 'load_resume_state', 'save_resume_state']

LAST = 'last.pth.tar'


def find_last(run_dir: Path) -> Optional[Path]:
    """Last checkpoint of a run, None if there is none yet."""
    path = run_dir / LAST
    return path if path.is_file() else None


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
        self.saver: Optional[utils.CheckpointSaver] = None  # of the first process, once `open` has been called

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
                return None  # killed before its first checkpoint, or not begun
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

    def open(self, saver: utils.CheckpointSaver, options: str, metric: str) -> None:
        """Begin to write, in the first process.

        Args:
            saver: Checkpoint saver of this folder.
            options: Text of args.yaml.
            metric: Metric of the best checkpoint.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / 'args.yaml').write_text(options)
        self.saver = saver
        self.metric = metric

    def go_on(self, checkpoint: Path, start_epoch: int) -> None:
        """Bring the folder of a run that was killed at any point into the state right after one of its checkpoints."""
        trim_summary(self.path, start_epoch)
        *before, last = read_summary(self.path) or [None]
        if last is None:
            return
        self._restore_saver(before)
        # the saver may have been killed before it had made copies of the checkpoint and dropped a worse one
        file_checkpoint(self.saver, checkpoint, int(last['epoch']), last[metric_key(last, self.metric)])

    def _restore_saver(self, rows: List[Dict[str, float]]) -> None:
        """Tell the saver of the checkpoints of the epochs in `rows` that are on disk, and of the best epoch."""
        files: List[Tuple[str, float]] = []
        for row in rows:
            path = self.path / f'checkpoint-{int(row["epoch"])}.pth.tar'
            if path.is_file():
                files.append((str(path), row[metric_key(row, self.metric)]))
        self.saver.checkpoint_files = sorted(files, key=lambda f: f[1], reverse=not self.saver.decreasing)
        best = best_row(rows, self.metric)
        if best is not None:
            self.saver.best_epoch, self.saver.best_metric = int(best['epoch']), best[metric_key(best, self.metric)]

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
    ) -> None:
        """Write summary row and checkpoint of an epoch, in the first process.

        Args:
            epoch: Its index.
            train_metrics: Of training.
            eval_metrics: Of validation, None if there is none.
            learning_rate: Mean over the parameter groups.
        """
        utils.update_summary(
            epoch,
            train_metrics,
            eval_metrics,
            filename=str(self.path / SUMMARY),
            lr=learning_rate,
            write_header=not (self.path / SUMMARY).exists(),
        )
        self.saver.save_checkpoint(epoch, metric=(eval_metrics or train_metrics)[self.metric])
