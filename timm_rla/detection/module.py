"""A detector in Lightning: its steps, its evaluation, and what that writes."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import lightning.pytorch as pl
import torch
from timm.utils import distribute_bn
from torchvision.models.detection import FasterRCNN

from ..common.device import Placement
from ..common.errors import UserError, blame
from ..common.files import replacing
from ..common.optimizers import HYPERPARAMETERS
from ..common.summary import write_row
from .checkpoint import TrainedDetector, is_readable
from .coco import CocoSplit
from .evaluation import NUMBERS, CocoMetric, by_class_name, coco_results
from .schedule import Schedule

__all__ = ['Detection']


class Detection(pl.LightningModule):
    """Training and evaluation of a detector.

    Random numbers of an iteration depend on nothing but the seed, the iteration and the process: a run that goes on
    needs no state of them.

    Args:
        detector: As `fasterrcnn` returns it.
        classes: Has `names` and `category_ids` of labels 1 to K, as the splits of its data do. They go into
            checkpoints, as `detector`, with the arguments that the detector was made with.
        schedule: Optimizer and learning rate; None for evaluation alone.
        seed: Of random numbers.
        folder: Where evaluations are written; None for nowhere.

    Raises:
        ValueError: The detector was made with an argument that could not be read from its checkpoints.
    """

    def __init__(
            self,
            detector: FasterRCNN,
            classes: Union[CocoSplit, TrainedDetector],
            schedule: Optional[Schedule] = None,
            seed: int = 0,
            folder: Optional[Path] = None,
    ):
        super().__init__()
        self.detector = detector
        self.description = dict(
            detector.arguments, names=list(classes.names), category_ids=list(classes.category_ids))
        for name, value in self.description.items():
            if not is_readable(self.description, name):
                raise ValueError(f'{name} {value!r}: checkpoints cannot have this argument of the detector')
        self.schedule = schedule
        self.seed = seed
        self.folder = folder
        self.losses: Dict[str, torch.Tensor] = {}  # sums since the last evaluation, and `count`
        self.found: List[Tuple[Dict[str, torch.Tensor], Dict[str, Any]]] = []  # detections and target of each image
        self.numbers: Dict[str, Any] = {}  # of the last evaluation

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.schedule.optimizer(self.detector)
        self._options = [{key: group[key] for key in HYPERPARAMETERS & group.keys()}
                         for group in optimizer.param_groups]
        return optimizer

    def on_train_start(self) -> None:
        """Weight decay, momentum and the like are those of the options, whatever a checkpoint has brought along."""
        for group, options in zip(self.optimizers().param_groups, self._options):
            group.update(options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.optimizers().param_groups:
            group['lr'] = self.schedule.rate(self.global_step)
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * 4_099 + self.global_rank)

    def training_step(self, batch: Tuple[List[torch.Tensor], List[Dict[str, torch.Tensor]]], batch_idx: int):
        losses = self.detector(*batch)
        total = sum(losses.values())
        if not total.isfinite():
            raise UserError(
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
        for found, target in zip(self.detector(images), targets):
            self.found.append((_on_cpu(found), _on_cpu(target)))

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:  # running statistics of the first process for all, as in its checkpoint
            distribute_bn(self.detector, self.trainer.world_size, reduce=False)
        self.found = []

    def on_validation_epoch_end(self) -> None:
        place = Placement(self.device, distributed=self.trainer.world_size > 1, world_size=self.trainer.world_size)
        # in one order, whatever the number of processes: it decides between detections of the same score
        self.found = sorted(place.gather(self.found), key=lambda pair: pair[1]['id'])
        if not self.found:
            raise UserError('no image of validation can be read')
        metric = CocoMetric()
        metric.add(*zip(*self.found))
        numbers = metric.numbers()
        self.log('map', numbers['map'], sync_dist=True)  # the same in all processes
        self.numbers = numbers
        if self.folder is not None and self.trainer.is_global_zero:
            self._write(numbers)

    def results(self) -> List[Dict[str, Any]]:
        """Detections of the last evaluation, in the images of all processes, as COCO's result files have them."""
        detections, targets = zip(*self.found)
        return coco_results(detections, [target['id'] for target in targets], self.description['category_ids'])

    def _write(self, numbers: Dict[str, Any]) -> None:
        """Add a row to summary.csv, and write metrics.json, with the classes."""
        row: Dict[str, float] = dict(epoch=self.global_step)
        count = self.losses.pop('count', None)
        row.update({f'train_{name}': (total / count).item() for name, total in self.losses.items()})
        row.update({f'eval_{name}': numbers[name] for name in NUMBERS})
        row['lr'] = self.schedule.rate(self.global_step)
        self.losses = {}
        write_row(self.folder, row)
        content = dict(iteration=self.global_step, **by_class_name(numbers, self.description['names']))
        with blame(str(self.folder), OSError), replacing(self.folder / 'metrics.json') as temporary:
            temporary.write_text(json.dumps(content, indent=1) + '\n')

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint.update(detector=self.description, losses=self.losses)
        if self.schedule is not None:
            checkpoint.update(opt=self.schedule.opt)

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        self.losses = checkpoint['losses']


def _on_cpu(target: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in target.items()}
