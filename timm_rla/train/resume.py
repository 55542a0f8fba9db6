"""Going on with a run: finding its last checkpoint and putting back all that timm's checkpoints do not hold.

A checkpoint of timm holds model, optimizer, EMA and loss scaler. Beside it, for each process, lies a small file with
the random number generators and the scheduler, `resume-EPOCH-RANK.pth`. It is written first, and each file under
another name that is then replaced, so that a run killed at any point finds a checkpoint with all that belongs to it.
"""
import csv
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.utils import CheckpointSaver

from ..files import replacing

__all__ = [
    'best_row', 'find_last', 'load_resume_state', 'metric_key', 'read_summary', 'restore_saver', 'save_resume_state',
    'trim_summary',
]

SUMMARY = 'summary.csv'
LAST = 'last.pth.tar'


def find_last(run_dir: Path) -> Optional[Path]:
    """Last checkpoint of a run, None if there is none yet."""
    path = run_dir / LAST
    return path if path.is_file() else None


def _resume_path(run_dir: Path, epoch: int, rank: int) -> Path:
    return run_dir / f'resume-{epoch}-{rank}.pth'


def save_resume_state(run_dir: Path, epoch: int, rank: int, state: Dict[str, Any]) -> None:
    """Write what belongs to the checkpoint of an epoch; only this one and the one before are kept."""
    path = _resume_path(run_dir, epoch, rank)
    with replacing(path) as temporary:
        torch.save(state, temporary)
    kept = sorted(run_dir.glob(f'resume-*-{rank}.pth'), key=lambda p: int(p.name.split('-')[1]))[-2:]
    for old in run_dir.glob(f'resume-*-{rank}.pth'):
        if old not in kept:
            old.unlink()


def load_resume_state(run_dir: Path, epoch: int, rank: int) -> Optional[Dict[str, Any]]:
    """What `save_resume_state` wrote for an epoch, None if there is nothing, as beside checkpoints of timm's script."""
    path = _resume_path(run_dir, epoch, rank)
    return torch.load(path, weights_only=True) if path.is_file() else None


def read_summary(run_dir: Path) -> List[Dict[str, float]]:
    """Rows of a run's summary.csv as numbers, in the order of epochs; none if there is no file."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return []
    with open(path, newline='') as f:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)]


def trim_summary(run_dir: Path, start_epoch: int) -> None:
    """Drop rows of epochs that will be run again."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return
    with open(path, newline='') as f:
        header, *rows = csv.reader(f)
    whole = (row for row in rows if len(row) == len(header))  # a kill can cut the last one short
    with replacing(path) as temporary, open(temporary, 'w', newline='') as f:
        csv.writer(f).writerows([header, *(row for row in whole if int(row[0]) < start_epoch)])


def best_row(rows: List[Dict[str, float]], metric: str) -> Optional[Dict[str, float]]:
    """First row with the best value of a metric, such as 'top1' or 'loss', as timm's checkpoint saver counts it."""
    if not rows:
        return None
    key = metric_key(rows[0], metric)
    return (min if metric == 'loss' else max)(rows, key=lambda row: row[key])


def metric_key(row: Dict[str, float], metric: str) -> str:
    """Column of a metric: that of the validation, or of the training where there is no validation."""
    return f'eval_{metric}' if f'eval_{metric}' in row else f'train_{metric}'


def restore_saver(saver: CheckpointSaver, run_dir: Path, rows: List[Dict[str, float]], metric: str) -> None:
    """Let a new checkpoint saver know the checkpoints of the epochs in `rows` that are on disk, and the best epoch."""
    files: List[Tuple[str, float]] = []
    for row in rows:
        path = run_dir / f'checkpoint-{int(row["epoch"])}.pth.tar'
        if path.is_file():
            files.append((str(path), row[metric_key(row, metric)]))
    saver.checkpoint_files = sorted(files, key=lambda f: f[1], reverse=not saver.decreasing)
    best = best_row(rows, metric)
    if best is not None:
        saver.best_epoch, saver.best_metric = int(best['epoch']), best[metric_key(best, metric)]
