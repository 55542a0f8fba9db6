"""Images and targets for training and evaluation, and the order in which training sees them."""
import logging
from functools import cached_property
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..common.errors import UserError
from ..common.images import read_image
from .coco import CocoSplit, ImageEntry, training_boxes

__all__ = ['Batches', 'DetectionData', 'EvaluationImages', 'TrainingImages', 'read_pixels']

_logger = logging.getLogger(__name__)
Sample = Tuple[torch.Tensor, Dict[str, Any]]


def read_pixels(path: Any) -> torch.Tensor:
    """An image as [3, H, W] in [0, 1].

    Raises:
        UserError: It cannot be read.
    """
    return v2.functional.to_dtype(
        v2.functional.pil_to_tensor(read_image(path).convert('RGB')), torch.float32, scale=True)


def _read(entry: ImageEntry) -> torch.Tensor:
    pixels = read_pixels(entry.path)
    if pixels.shape[1:] != (entry.height, entry.width):
        raise UserError(f'{entry.path}: has {pixels.shape[2]} x {pixels.shape[1]} pixels, its annotation '
                        f'{entry.width} x {entry.height}')
    return pixels


def _read_or_skip(entry: ImageEntry, skip: bool, instead: str) -> Optional[torch.Tensor]:
    """Pixels of an image; None, which is said, of one that cannot be read, if such are to be skipped."""
    try:
        return _read(entry)
    except UserError as e:
        if not skip:
            raise UserError(f'{e}; --skip-unreadable goes on without it') from e
        _logger.warning(f'{e}; {instead}')
        return None


class TrainingImages(Dataset):
    """Augmented images. An index is a pair: that of the image, and the seed of its augmentation.

    Args:
        split: The images.
        hflip: Probability of a horizontal flip.
        skip_unreadable: Take the next image instead of one that cannot be read, and say so.
    """

    def __init__(self, split: CocoSplit, hflip: float = 0.5, skip_unreadable: bool = False):
        self.images = split.images
        self.skip_unreadable = skip_unreadable
        self.augmentation = v2.Compose([v2.RandomHorizontalFlip(hflip), v2.ToPureTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tuple[int, int]) -> Sample:
        number, seed = index
        for offset in range(len(self.images)):
            entry = self.images[(number + offset) % len(self.images)]
            pixels = _read_or_skip(entry, self.skip_unreadable, 'another image is taken')
            if pixels is not None:
                break
        else:
            raise UserError('no image can be read')
        boxes, labels = training_boxes(entry)
        target = dict(boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=pixels.shape[1:]), labels=labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.augmentation(tv_tensors.Image(pixels), target)


class EvaluationImages(Dataset):
    """Images as they are, with what the file says of them: `id`, `boxes` as (x, y, width, height), `labels`, ..."""

    def __init__(self, split: CocoSplit, skip_unreadable: bool = False):
        self.images = split.images
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Optional[Sample]:
        entry = self.images[index]
        pixels = _read_or_skip(entry, self.skip_unreadable, 'left out')
        if pixels is None:
            return None
        return pixels, dict(id=entry.id, boxes=entry.boxes, labels=entry.labels, iscrowd=entry.crowd.long(),
                            area=entry.area)


class Batches:
    """Endless shuffled batches of images of one orientation, as a function of seed and position.

    All processes draw the same global batches and take a part each: what is trained on depends neither on their
    number nor on where a run was interrupted.

    Args:
        landscape: True for images that are wider than high.
        batch_size: Images of each process.
        seed: Seed of the order.
        start: Batches that have been seen before.
        count: Batches until the end of training, with those before.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
            self,
            landscape: Sequence[bool],
            batch_size: int,
            seed: int,
            start: int,
            count: int,
            rank: int = 0,
            world_size: int = 1,
    ):
        self.landscape = landscape
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.count = count
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.count

    def _images(self) -> Iterator[Tuple[int, int]]:
        """Images without end, each with a seed."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for index in torch.randperm(len(self.landscape), generator=generator).tolist():
                yield index, int(torch.randint(2 ** 62, (), generator=generator))

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        waiting: Dict[bool, List[Tuple[int, int]]] = {True: [], False: []}
        size, done = self.batch_size * self.world_size, 0
        for index, seed in self._images():
            if done >= self.count:
                return
            group = waiting[bool(self.landscape[index])]
            group.append((index, seed))
            if len(group) == size:
                if done >= self.start:
                    yield group[self.rank::self.world_size]
                group.clear()
                done += 1


def _together(samples: Sequence[Optional[Sample]]) -> Tuple[List[torch.Tensor], List[Dict[str, Any]]]:
    """A batch of images of any size."""
    whole = [sample for sample in samples if sample is not None]
    return [pixels for pixels, _ in whole], [target for _, target in whole]


class DetectionData(pl.LightningDataModule):
    """Batches of training, from where the trainer stands, and images of validation, each in one process.

    Args:
        train: Images to train on.
        val: Images to validate on.
        batch_size: Images of each process in training.
        workers: Processes that read images.
        seed: Seed of order and augmentation.
        hflip: Probability of a horizontal flip.
        skip_unreadable: Go on without images that cannot be read.
    """

    def __init__(
            self,
            train: Optional[CocoSplit],
            val: CocoSplit,
            batch_size: int = 1,
            workers: int = 0,
            seed: int = 0,
            hflip: float = 0.5,
            skip_unreadable: bool = False,
    ):
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.workers = batch_size, workers
        self.seed, self.hflip = seed, hflip
        self.skip_unreadable = skip_unreadable

    @cached_property
    def _loading(self) -> Dict[str, Any]:
        return dict(num_workers=self.workers, collate_fn=_together, pin_memory=torch.cuda.is_available(),
                    persistent_workers=self.workers > 0)

    def train_dataloader(self) -> DataLoader:
        """Batches from the iteration on that the trainer is at.

        Raises:
            ValueError: The trainer has no number of iterations.
        """
        trainer = self.trainer
        if trainer.max_steps < 1:
            raise ValueError(f'max_steps {trainer.max_steps}: a detector trains for a number of iterations, as in '
                             'Trainer(max_steps=3000)')
        batches = Batches(
            [entry.width > entry.height for entry in self.train.images],
            self.batch_size,
            self.seed,
            trainer.global_step * trainer.accumulate_grad_batches,
            trainer.max_steps * trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
        )
        images = TrainingImages(self.train, self.hflip, self.skip_unreadable)
        return DataLoader(images, batch_sampler=batches, **self._loading)

    def val_dataloader(self) -> DataLoader:
        images = EvaluationImages(self.val, self.skip_unreadable)
        mine = range(self.trainer.global_rank, len(images), self.trainer.world_size)
        # one by one, as in torchvision's script: in a batch they are filled up, which changes what is found in them
        return DataLoader(Subset(images, mine), batch_size=1, **self._loading)
