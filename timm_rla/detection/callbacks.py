"""What happens along a run of Lightning: checkpoints, the end on request, lines of progress."""
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from ..common.checkpoint import read_checkpoint
from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.files import file_digest, replacing
from ..common.progress import show_rate
from ..common.stopping import Stopped, StopRequest
from .checkpoint import checkpoints

__all__ = ['Best', 'CheckpointFiles', 'Checkpoints', 'Lines', 'SameCheckpoint']

_logger = logging.getLogger(__name__)


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints that are never half written, and read without running code in them.

    Args:
        accumulate: Batches of an iteration.
    """

    def __init__(self, accumulate: int = 1):
        super().__init__()
        self.accumulate = accumulate

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        path = Path(path)
        with blame(str(path), OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Optional[bool] = None):
        """A checkpoint, whose batches are counted as this run counts them.

        How many there are in an iteration, and whether the last one of a shorter run was behind it, is of no matter
        here: the order of images depends on the iteration alone.
        """
        checkpoint = read_checkpoint(str(path), '--resume')
        with blame(f'--resume {path}: its position', AttributeError, LookupError, TypeError):
            batches = checkpoint['global_step'] * self.accumulate
            loop = checkpoint['loops']['fit_loop']
            loop['epoch_loop.batch_progress']['is_last_batch'] = False
            for counts in map(loop['epoch_loop.batch_progress'].get, ('total', 'current')):
                # Lightning reads from their distance where in a batch the checkpoint was written
                counts.update({name: batches + count - counts['processed'] for name, count in counts.items()})
            for counts in map(loop['epoch_progress'].get, ('total', 'current')):  # all iterations are one epoch
                counts.update(ready=1, started=1, processed=0, completed=0)
        return checkpoint


class SameCheckpoint(pl.Callback):
    """All processes go on from the file that the first one has chosen.

    Args:
        path: That of this process, None for a run that begins.
    """

    def __init__(self, path: Optional[Path]):
        self.path = path

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        found = self.path and file_digest(self.path)
        if found != trainer.strategy.broadcast(found):
            raise UserError(f'--resume {self.path}: not the same file as in the first process; the folder of a run '
                            'must be shared by all')


class Checkpoints(pl.Callback):
    """The last two checkpoints, and one more when the process is asked to stop, which then ends.

    That of an iteration with an evaluation comes after it, so that none is left out. Lightning's ModelCheckpoint would
    write it before the evaluation, or not at all in the last iteration. Who is asked to stop in an evaluation writes
    none: the run goes on from the last one and evaluates anew.

    Args:
        folder: Of the run.
        interval: Iterations between checkpoints.
        eval_interval: Iterations between evaluations.
        stop: Remembers the request.
    """

    def __init__(self, folder: Path, interval: int, eval_interval: int, stop: StopRequest):
        self.folder = folder
        self.interval = interval
        self.eval_interval = eval_interval
        self.stop = stop

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % self.eval_interval == 0:
            return
        stopping = self._asked(trainer)
        if stopping or self._due(trainer):
            self._save(trainer)
        if stopping:
            raise Stopped(f'stopped after {step} iterations; --resume auto goes on')

    def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
            dataloader_idx: int = 0) -> None:
        common = len(trainer.datamodule.val.images) // trainer.world_size  # images that all processes have
        if batch_idx < common and self._asked(trainer):
            raise Stopped(f'stopped in the evaluation after {trainer.global_step} iterations; --resume auto goes on')

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._due(trainer):
            self._save(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.interval == 0 or trainer.global_step == trainer.max_steps

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / f'checkpoint-{trainer.global_step}.ckpt')
        if trainer.is_global_zero:
            for path in checkpoints(self.folder)[2:]:
                path.unlink()

    def _asked(self, trainer: pl.Trainer) -> bool:
        return self.stop.agreed(Placement(trainer.strategy.root_device, distributed=trainer.world_size > 1))


class Best(ModelCheckpoint):
    """best.ckpt, of the evaluation with the highest mAP.

    A run that goes on asks the folder what is the best so far, not the checkpoint: that was written before its own
    evaluation counted here, and what it knows of may be gone.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, 'best', monitor='map', mode='max', auto_insert_metric_name=False,
                         enable_version_counter=False)
        self.found: Optional[float] = None  # mAP of the file as the run begins, None without one; of the first process

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = trainer.strategy.broadcast(self.found)
        if found is not None:
            self.best_model_path = self.kth_best_model_path = self.format_checkpoint_name({})
            self.best_model_score = self.kth_value = torch.tensor(found)
            self.best_k_models = {self.best_model_path: self.best_model_score}


class Lines(pl.Callback):
    """Progress in a log: iteration, losses, speed and the time that is left.

    Args:
        interval: Iterations between lines, and images of an evaluation.
    """

    def __init__(self, interval: int):
        self.interval = interval

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin, self.first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step % self.interval or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = (time.perf_counter() - self.begin) / (step - self.first)
        images = len(batch[0]) * trainer.world_size * trainer.accumulate_grad_batches
        left = timedelta(seconds=int(seconds * (trainer.max_steps - step)))
        _logger.info(f'Train [{step}/{trainer.max_steps}]  {show_rate(images, seconds)}  {left} left  '
                     f'loss {float(trainer.callback_metrics["loss"]):.3f}')

    def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
            dataloader_idx: int = 0) -> None:
        if trainer.is_global_zero and (batch_idx + 1) % self.interval == 0:
            _logger.info(f'Evaluate [{batch_idx + 1}/{trainer.num_val_batches[0]}]')

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            numbers = pl_module.numbers
            _logger.info(f'Iteration {trainer.global_step}: mAP@.5 {numbers["map_50"]:.4f}, '
                         f'mAP@[.5,.95] {numbers["map"]:.4f}')
