"""A detector in Lightning: steps, optimizer and schedule, evaluation, and what a run leaves in its folder."""
import json
import logging
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from timm.optim import create_optimizer_v2
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR
from torchvision.models.detection import FasterRCNN

from ..common.checkpoint import read_checkpoint
from ..common.device import Placement
from ..common.errors import blame
from ..common.files import replacing
from ..common.stopping import Stopped, StopRequest
from ..common.summary import write_row
from .checkpoint import checkpoints
from .evaluation import NUMBERS, CocoMetric, by_class_name, coco_results

__all__ = ['CheckpointFiles', 'Checkpoints', 'Detection', 'Lines', 'Schedule', 'StopOnRequest']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """Optimizer and learning rate by iteration."""
    iterations: int
    lr: float
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_iterations: int = 0
    warmup_factor: float = 0.001
    opt: str = 'sgd'
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def scaled(self, base_batch_size: int, batch_size: int) -> 'Schedule':
        """For another number of images per iteration, by the linear rule: as many images, the same rate per image.

        Rule: `Accurate, Large Minibatch SGD` - https://arxiv.org/abs/1706.02677

        Args:
            base_batch_size: Images per iteration that this is for.
            batch_size: Images per iteration.
        """
        def times(iterations: int) -> int:
            return round(iterations * base_batch_size / batch_size)

        return Schedule(**{
            **asdict(self),
            'iterations': max(1, times(self.iterations)),
            'lr': self.lr * batch_size / base_batch_size,
            'milestones': tuple(map(times, self.milestones)),
            'warmup_iterations': times(self.warmup_iterations),
        })

    def __str__(self) -> str:
        parts = [f'{self.iterations:,} iterations', f'{self.opt}, learning rate {self.lr:g}']
        if self.milestones:
            parts.append(f'times {self.gamma:g} at ' + ', '.join(f'{number:,}' for number in self.milestones))
        if self.warmup_iterations:
            parts.append(f'warm-up over {self.warmup_iterations:,}')
        return ', '.join(parts)

    def optimizer(self, model: torch.nn.Module) -> Tuple[torch.optim.Optimizer, LRScheduler]:
        """Optimizer of what is trained, all of it with weight decay, and its schedule."""
        optimizer = create_optimizer_v2(
            [p for p in model.parameters() if p.requires_grad], self.opt, lr=self.lr, weight_decay=self.weight_decay,
            momentum=self.momentum)
        schedules: List[LRScheduler] = [MultiStepLR(optimizer, list(self.milestones), self.gamma)]
        if self.warmup_iterations:
            schedules.append(LinearLR(optimizer, self.warmup_factor, total_iters=self.warmup_iterations))
        return optimizer, ChainedScheduler(schedules)


class Detection(pl.LightningModule):
    """Training and evaluation of a detector.

    Random numbers of an iteration depend on nothing but the seed, the iteration and the process: a run that goes on
    needs no state of them.

    Args:
        detector: As `fasterrcnn` returns it.
        description: What makes it anew, with `names` and `category_ids` of labels 1 to K: goes into checkpoints as
            `detector`.
        schedule: Optimizer and learning rate; None for evaluation alone.
        seed: Of random numbers.
        folder: Where evaluations are written; None for nowhere.
    """

    def __init__(
            self,
            detector: FasterRCNN,
            description: Dict[str, Any],
            schedule: Optional[Schedule] = None,
            seed: int = 0,
            folder: Optional[Path] = None,
    ):
        super().__init__()
        self.detector = detector
        self.description = description
        self.schedule = schedule
        self.seed = seed
        self.folder = folder
        self.metric = CocoMetric()
        self.losses: Dict[str, torch.Tensor] = {}  # sums since the last evaluation, and `count`
        self.results: List[Dict[str, Any]] = []  # of the last evaluation in this process, as COCO has them
        self.keep_results = False
        self.numbers: Dict[str, Any] = {}  # of the last evaluation

    def configure_optimizers(self) -> Dict[str, Any]:
        optimizer, scheduler = self.schedule.optimizer(self.detector)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=scheduler, interval='step'))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * 4_099 + self.global_rank)

    def training_step(self, batch: Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]], batch_idx: int):
        losses = self.detector(*batch)
        total = sum(losses.values())
        if not total.isfinite():
            raise FloatingPointError(
                f'iteration {self.global_step + 1}: the loss is {total.item()} '
                f'({", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())}); '
                'try a smaller learning rate or --clip-grad')
        for name, value in dict(losses, loss=total, count=total.new_ones(())).items():
            self.losses[name] = self.losses.get(name, 0) + value.detach().double()
        self.log_dict({f'train/{name}': value.detach() for name, value in losses.items()})
        self.log('loss', total.detach(), prog_bar=True)
        return total

    def validation_step(self, batch: Tuple[List[torch.Tensor], List[Dict[str, Any]]], batch_idx: int) -> None:
        images, targets = batch
        if not images:
            return
        detections = [{key: value.float() if value.is_floating_point() else value for key, value in found.items()}
                      for found in self.detector(images)]
        self.metric.add(detections, targets)
        if self.keep_results:
            self.results += coco_results(detections, [target['id'] for target in targets],
                                         self.description['category_ids'])

    def on_validation_epoch_start(self) -> None:
        self.metric.reset()
        self.results = []

    def on_validation_epoch_end(self) -> None:
        numbers = self.metric.numbers()
        self.metric.reset()
        self.log('map', numbers['map'], sync_dist=True)  # the same in all processes
        self.numbers = numbers
        if self.folder is not None and self.trainer.is_global_zero:
            self._write(numbers)

    def _write(self, numbers: Dict[str, Any]) -> None:
        """Add a row to summary.csv, and write metrics.json, with the classes."""
        row: Dict[str, float] = dict(epoch=self.global_step)
        count = self.losses.pop('count', None)
        row.update({f'train_{name}': (total / count).item() for name, total in self.losses.items()})
        row.update({f'eval_{name}': numbers[name] for name in NUMBERS})
        row['lr'] = self.optimizers().param_groups[0]['lr']
        self.losses = {}
        write_row(self.folder, row)
        content = dict(iteration=self.global_step, **by_class_name(numbers, self.description['names']))
        with blame(str(self.folder), OSError), replacing(self.folder / 'metrics.json') as temporary:
            temporary.write_text(json.dumps(content, indent=1) + '\n')

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint.update(detector=self.description, losses=self.losses)

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        self.losses = checkpoint['losses']


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints that are never half written, and read without running code in them."""

    def save_checkpoint(self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        path = Path(path)
        with blame(str(path), OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Optional[bool] = None):
        return read_checkpoint(str(path), '--resume')


class Checkpoints(pl.Callback):
    """The last two checkpoints. That of an iteration with an evaluation comes after it, so that none is left out.

    Lightning's ModelCheckpoint would write it before the evaluation, or not at all in the last iteration.

    Args:
        folder: Of the run.
        interval: Iterations between checkpoints.
        eval_interval: Iterations between evaluations.
    """

    def __init__(self, folder: Path, interval: int, eval_interval: int):
        self.folder = folder
        self.interval = interval
        self.eval_interval = eval_interval

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.eval_interval:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step % self.interval and step < trainer.max_steps:
            return
        trainer.save_checkpoint(self.folder / f'checkpoint-{step}.ckpt')
        if trainer.is_global_zero:
            for path in checkpoints(self.folder)[2:]:
                path.unlink()


class StopOnRequest(pl.Callback):
    """Leaves a checkpoint and ends when the process is asked to stop.

    In an evaluation it leaves none: the run goes on from the last one and evaluates anew.

    Args:
        stop: Remembers the request.
        folder: Of the run.
        eval_interval: Iterations between evaluations.
    """

    def __init__(self, stop: StopRequest, folder: Path, eval_interval: int):
        self.stop = stop
        self.folder = folder
        self.eval_interval = eval_interval

    def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % self.eval_interval == 0:
            return
        if self._asked(trainer):
            path = self.folder / f'checkpoint-{step}.ckpt'
            if not path.is_file():
                trainer.save_checkpoint(path)
            raise Stopped(f'stopped after {step} iterations; --resume auto goes on')

    def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
            dataloader_idx: int = 0) -> None:
        data = trainer.datamodule
        common = len(data.val.images) // (trainer.world_size * data.batch_size)  # batches that all processes have
        if batch_idx < common and self._asked(trainer):
            raise Stopped(f'stopped in the evaluation after {trainer.global_step} iterations; --resume auto goes on')

    def _asked(self, trainer: pl.Trainer) -> bool:
        return self.stop.agreed(Placement(trainer.strategy.root_device, distributed=trainer.world_size > 1))


class Lines(pl.Callback):
    """Progress in a log: iteration, losses, speed and the time that is left.

    Args:
        interval: Iterations between lines, and batches of an evaluation.
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
        _logger.info(f'Train [{step}/{trainer.max_steps}]  {images / seconds:.1f} img/s  {left} left  '
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
