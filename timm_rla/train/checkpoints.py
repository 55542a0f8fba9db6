"""Checkpoints of a run: `last`, the best ones by epoch, and `model_best`, named as timm's CheckpointSaver names them.

Unlike there, no file is ever missing while another takes its place, each is on the disk before it counts, and none
shares its bytes with another.
"""
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch

from ..common.checkpoint import read_checkpoint
from ..common.errors import UserError, blame
from ..common.files import replacing
from ..common.summary import sort_key
from ..common.trained import completed_epochs

__all__ = ['LAST', 'Checkpoints', 'Kept', 'epoch_file', 'find_last']

LAST, BEST = 'last.pth.tar', 'model_best.pth.tar'
_logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """An epoch whose checkpoint is kept."""
    epoch: int
    metric: float


def epoch_file(epoch: int) -> str:
    """Name of the checkpoint that is kept of an epoch."""
    return f'checkpoint-{epoch}.pth.tar'


class Checkpoints:
    """Writes the checkpoints of a run.

    Args:
        folder: Folder of the run.
        keep: How many of the best are kept by epoch.
        decreasing: A lower metric is better.
    """

    def __init__(self, folder: Path, keep: int = 10, decreasing: bool = False):
        self.folder = folder
        self.keep = keep
        self.decreasing = decreasing
        self.kept: List[Kept] = []  # from best to worst, of equals the earlier first
        self.best: Optional[Kept] = None

    def _better(self, metric: float, than: float) -> bool:
        return sort_key(metric, self.decreasing) < sort_key(than, self.decreasing)

    def take_as_last(self, checkpoint: Path) -> None:
        """Make a checkpoint of the run the last one, before anything that came after it goes."""
        if checkpoint.resolve() != (self.folder / LAST).resolve():
            self._copy(LAST, checkpoint)

    def restore(self, rows: List[Kept], start_epoch: int) -> None:
        """Know what a run has written before an epoch, and drop what it has written later.

        The run may have been killed before it had made copies of `last`, or have gone back to an earlier checkpoint:
        in the end each file is of the epoch that it should be of.

        Args:
            rows: Its epochs before that with their metrics.
            start_epoch: The epoch.

        Raises:
            UserError: A file cannot be written.
        """
        for path in self.folder.glob('checkpoint-*.pth.tar'):
            if _epoch_of(path) >= start_epoch:
                path.unlink(missing_ok=True)
        last = self._epoch_in(LAST)
        before = [row for row in rows if row.epoch != last]
        self.kept = self._ranked([row for row in before if (self.folder / epoch_file(row.epoch)).is_file()])
        self.best = self.kept[0] if self.kept else None
        if self.best is not None and self._epoch_in(BEST) != self.best.epoch:
            self._copy(BEST, self.folder / epoch_file(self.best.epoch))
        for row in rows:
            if row.epoch == last:
                self.rank(*row)
        if self.best is None:
            (self.folder / BEST).unlink(missing_ok=True)
        self._drop(self.kept[self.keep:])  # more were kept before
        self.kept = self.kept[:self.keep]

    def _epoch_in(self, name: str) -> Optional[int]:
        """Epoch that a file says it is of; None if it cannot be read."""
        try:
            return completed_epochs(read_checkpoint(str(self.folder / name), name), name) - 1
        except UserError:
            return None

    def _ranked(self, rows: List[Kept]) -> List[Kept]:
        return sorted(rows, key=lambda row: sort_key(row.metric, self.decreasing))

    def save(self, content: Dict[str, Any], epoch: int, metric: float) -> None:
        """Write the checkpoint of an epoch.

        Args:
            content: What it holds, but for epoch and metric.
            epoch: Index of the epoch.
            metric: That it is ranked by.

        Raises:
            UserError: It cannot be written; all that was there before is still there.
        """
        path = self.folder / LAST
        with blame(str(path), OSError, RuntimeError), replacing(path) as temporary:
            torch.save(dict(content, epoch=epoch, metric=metric, version=2), temporary)  # timm's format
        self.rank(epoch, metric)

    def rank(self, epoch: int, metric: float) -> None:
        """Copy `last`, the checkpoint of an epoch, to where it belongs, and drop the one that it displaces."""
        if len(self.kept) < self.keep or self._better(metric, self.kept[-1].metric):
            self._copy(epoch_file(epoch))
            ranked = self._ranked([*(row for row in self.kept if row.epoch != epoch), Kept(epoch, metric)])
            self.kept = ranked[:self.keep]
            self._drop(ranked[self.keep:])
        if self.best is None or self._better(metric, self.best.metric):
            self._copy(BEST)
            self.best = Kept(epoch, metric)

    def _drop(self, rows: List[Kept]) -> None:
        for row in rows:
            (self.folder / epoch_file(row.epoch)).unlink(missing_ok=True)

    def _copy(self, name: str, source: Optional[Path] = None) -> None:
        path = self.folder / name
        with blame(str(path), OSError), replacing(path) as temporary:
            shutil.copyfile(source or self.folder / LAST, temporary)


def find_last(folder: Path) -> Optional[Path]:
    """The newest checkpoint of a run that can be read; None if there is none.

    That is `last`. Should it be damaged or missing, it is the kept one of the latest epoch, which is said.
    """
    paths = [folder / LAST, *sorted(folder.glob('checkpoint-*.pth.tar'), key=_epoch_of, reverse=True)]
    problems = []
    for path in paths:
        if not path.is_file():
            problems.append(f'{path.name} is missing')
            continue
        try:
            read_checkpoint(str(path), '--resume')
        except UserError as e:
            problems.append(str(e))
            continue
        if problems:
            _logger.warning(f'{"; ".join(problems)}: going on from {path}')
        return path
    return None


def _epoch_of(path: Path) -> int:
    """Epoch of a file `checkpoint-EPOCH.pth.tar`; -1 of other files, such as the user's own copies."""
    number = re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', path.name)
    return int(number[1]) if number else -1
