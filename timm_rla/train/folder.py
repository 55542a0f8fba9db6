"""The folder of a run: what is written after each epoch and within, and going on from there.

A checkpoint holds model, optimizer, EMA and loss scaler. Beside it, for each process, lies a small file with the random
number generators and the schedule, `resume-EPOCH-RANK.pth`. It is written first, and each file under another name that
then takes its place, so that a run killed at any point finds a checkpoint with all that belongs to it.

Within an epoch it is the same: `recovery-EPOCH-BATCH.pth.tar`, as timm names it, and `recovery-EPOCH-BATCH-RANK.pth`.
"""
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch

from ..common.checkpoint import read_checkpoint
from ..common.errors import UserError, blame
from ..common.files import replacing
from ..common.lock import exclusive
from ..common.summary import SUMMARY, is_row, metric_key, read_summary, restore_rows, trim_summary, write_row
from ..common.trained import completed_epochs
from .checkpoints import Checkpoints, Kept, epoch_file, find_last
from .state import (
    RECOVERY,
    is_at,
    position_in,
    position_of,
    read_state,
    recovery_path,
    recovery_state_path,
    resume_path,
    state_epoch,
    why_unusable,
    write_state,
)

__all__ = ['RunFolder']

OF_EPOCHS = ('last', 'checkpoint-*', 'model_best')  # names of checkpoints behind epochs, without the ending
_logger = logging.getLogger(__name__)


class RunFolder:
    """Folder of one run.

    Args:
        path: The folder; made when the first file is written.
        rank: Process that writes. The first one writes all but the states of the others.
        world_size: Processes of the run.
        cut: Options that say how an epoch is cut into batches. Going on within an epoch takes the same ones.
    """

    def __init__(self, path: Path, rank: int = 0, world_size: int = 1, cut: Optional[Dict[str, Any]] = None):
        self.path = path
        self.rank = rank
        self.cut = dict(cut or {}, processes=world_size)
        self.checkpoints: Optional[Checkpoints] = None  # of the first process, once `open` has been called

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, in the first process. The death of the process frees it.

        Raises:
            UserError: Another run writes here, or the folder cannot be made.
        """
        if self.rank:
            yield
            return
        with exclusive(self.path, self._refusal):
            yield

    def _refusal(self, holder: str) -> str:
        return f'--experiment {self.path.name}: {holder or "another run"} writes to {self.path}'

    # Going on --------------------------------------------------------------------------------------------------------

    def find_checkpoint(self, resume: str) -> Optional[Path]:
        """Checkpoint to go on from, None for a fresh start.

        Args:
            resume: A file, 'auto' for the last checkpoint of this folder, or empty.

        Raises:
            UserError: There is no such file, it is of no use to this run, or the folder holds a run that would be
                written over.
        """
        checkpoint = None
        if resume == 'auto':
            checkpoint = self._find_newest()
            if checkpoint is None:
                # timm's script writes the row of the first epoch before its checkpoint
                if len(read_summary(self.path)) > 1 or self._holds_checkpoints():
                    raise UserError(f'--resume auto: {self.path} holds a run without a checkpoint that can be read')
                return None
        elif resume:
            checkpoint = Path(resume)
            with blame(f'--resume {checkpoint}', OSError):
                found = checkpoint.is_file()
            if not found:
                raise UserError(f'--resume {checkpoint}: no such file')
            why_not = why_unusable(checkpoint, read_checkpoint(resume, '--resume'), self.cut)
            if why_not:
                raise UserError(f'--resume {checkpoint}: within an epoch, {why_not}; take a checkpoint behind an epoch')
        with blame(f'--experiment {self.path.name}', OSError):
            held = (self.path / SUMMARY).exists() or self._holds_checkpoints() or bool(self._recoveries())
        if held and not (checkpoint and self.holds(checkpoint)):
            raise UserError(
                f'--experiment {self.path.name}: {self.path} holds a run; --resume auto goes on with it')
        return checkpoint

    def _find_newest(self) -> Optional[Path]:
        """The checkpoint that the run has come farthest with, of those that can be read."""
        last = find_last(self.path)
        if not self._recoveries():
            return last
        done = completed_epochs(read_checkpoint(str(last), '--resume'), f'--resume {last}') if last else 0
        for path in reversed(self._recoveries()):
            if position_of(path) < (done, 0):
                break
            try:
                why_not = why_unusable(path, read_checkpoint(str(path), '--resume'), self.cut)
            except UserError as e:
                why_not = str(e)
            if not why_not:
                return path
            _logger.warning(f'{path.name}: {why_not}; going on from the checkpoint before it')
        return last

    def holds(self, checkpoint: Path) -> bool:
        """True if a checkpoint lies in this folder."""
        return checkpoint.parent.resolve() == self.path.resolve()

    def resume_state(self, checkpoint: Path, content: Dict[str, Any], epoch: int) -> Dict[str, Any]:
        """What this process has left beside a checkpoint; empty if there is nothing, which is said.

        Args:
            checkpoint: The file.
            content: What it holds.
            epoch: Epoch that the run goes on with.

        Raises:
            UserError: The checkpoint is within an epoch, and where this process was cannot be read.
        """
        if RECOVERY in content:
            epoch, batches = position_in(content, checkpoint)
            path = recovery_state_path(checkpoint.parent, epoch, batches, self.rank)
            state = read_state(path)
            if not is_at(state, batches):
                raise UserError(f'--resume {checkpoint}: {path.name} beside it is missing or damaged')
            return state
        path = resume_path(checkpoint.parent, epoch - 1, self.rank)
        state = read_state(path)
        state.pop('position', None)  # which belongs to checkpoints within an epoch
        if not state:
            _logger.warning(f'{path}: {"damaged" if path.is_file() else "missing"}; random numbers begin anew')
        return state

    # Writing ---------------------------------------------------------------------------------------------------------

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

    def go_on(self, checkpoint: Path, start_epoch: int, batches: int = 0) -> None:
        """Bring the folder of a run that was killed at any point into the state right after one of its checkpoints.

        What is of later epochs goes, so that no file says of its weights what is not so. This may be killed, too: the
        next one goes on from the newest checkpoint that is left, or from this one.

        Args:
            checkpoint: In this folder.
            start_epoch: Epoch that the run goes on with.
            batches: Of this epoch, which the checkpoint has behind it.
        """
        for path in filter(position_of, self.path.glob('recovery-*.pth*')):  # which would be taken before `last`
            if position_of(path) not in ((start_epoch, batches), position_of(checkpoint)):
                path.unlink(missing_ok=True)
        if not batches and position_of(checkpoint) is None:
            self.checkpoints.take_as_last(checkpoint)
        for path in self.path.glob('resume-*.pth'):
            if state_epoch(path) >= start_epoch:
                path.unlink(missing_ok=True)
        trim_summary(self.path, start_epoch)
        if start_epoch and all(row['epoch'] != start_epoch - 1 for row in read_summary(self.path)):  # it is damaged
            restore_rows(self.path, self._rows_in_checkpoints(start_epoch))
        rows = [row for row in read_summary(self.path) if metric_key(row, self.metric) in row]
        self.checkpoints.restore(
            [Kept(int(row['epoch']), row[metric_key(row, self.metric)]) for row in rows], start_epoch)

    def _rows_in_checkpoints(self, start_epoch: int) -> List[Dict[str, float]]:
        """Rows of the summary that whole checkpoints hold, of epochs before this one."""
        rows = []
        for path in sorted(self.path.glob('*.pth.tar')):
            try:
                row = read_checkpoint(str(path), '--resume').get('summary')
            except UserError:
                continue
            if is_row(row) and row['epoch'] < start_epoch:
                rows.append(row)
        return rows

    def _holds_checkpoints(self) -> bool:
        return any(any(self.path.glob(f'{name}.pth.tar')) for name in OF_EPOCHS)

    def _recoveries(self) -> List[Path]:
        """Checkpoints within epochs, the farthest last."""
        return sorted(filter(position_of, self.path.glob('recovery-*.pth.tar')), key=position_of)

    def save_state(self, epoch: int, state: Dict[str, Any]) -> None:
        """Write what this process needs to go on behind an epoch. It comes before the checkpoint.

        This one, the one before and those of the checkpoints that are kept stay.
        """
        with blame(str(self.path), OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            write_state(resume_path(self.path, epoch, self.rank), state)
            states = [path for path in self.path.glob(f'resume-*-{self.rank}.pth') if state_epoch(path) >= 0]
            for path in sorted(states, key=state_epoch)[:-2]:  # with --val-interval the one before is not of epoch - 1
                if not (self.path / epoch_file(state_epoch(path))).is_file():
                    path.unlink(missing_ok=True)

    def save_recovery_state(self, epoch: int, batches: int, state: Dict[str, Any]) -> None:
        """Write what this process needs to go on behind some batches of an epoch. It comes before the checkpoint."""
        with blame(str(self.path), OSError):
            self.path.mkdir(parents=True, exist_ok=True)
        write_state(recovery_state_path(self.path, epoch, batches, self.rank), state)

    def save_recovery(self, epoch: int, batches: int, content: Dict[str, Any]) -> Path:
        """Write the checkpoint behind some batches of an epoch, and drop earlier ones, in the first process.

        It says that the epoch before is the last whole one: timm's script begins the epoch anew from it.
        """
        path = recovery_path(self.path, epoch, batches)
        recovery = dict(self.cut, batches=batches)
        with blame(str(path), OSError, RuntimeError), replacing(path) as temporary:
            torch.save({**content, 'epoch': epoch - 1, 'version': 2, RECOVERY: recovery}, temporary)
        self._drop_recoveries(before=(epoch, batches))
        return path

    def _drop_recoveries(self, before: Tuple[int, int]) -> None:
        for path in filter(position_of, self.path.glob('recovery-*.pth*')):
            if position_of(path) < before:
                path.unlink(missing_ok=True)

    def save_epoch(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            learning_rate: float,
            content: Dict[str, Any],
    ) -> Dict[str, float]:
        """Write checkpoint and summary row of an epoch, in the first process.

        The row comes last: what it says is done has left its weights.

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
        self.checkpoints.save(dict(content, summary=row), epoch, (eval_metrics or train_metrics)[self.metric])
        write_row(self.path, row)
        self._drop_recoveries(before=(epoch + 1, 0))
        return row
