"""The images of a training run: both splits, timm's loaders, and CIFAR's pad-and-crop."""
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from timm.data import FastCollateMixup, Mixup
from torchvision import transforms

from ..common.datasets import DataSource, check_same_classes, class_indices, label_names, open_dataset
from ..common.device import Placement
from ..common.errors import UserError
from ..common.in_memory import InMemoryLoader, check_augmentation, decode
from ..common.loaders import LoaderSpec, create_eval_loader, load_batches
from ..common.pixels import check_size
from .rng import RngTracker

__all__ = [
    'PAD', 'DataSpec', 'SplitSpec', 'Splits', 'TrainData', 'create_loaders', 'create_train_loader', 'open_splits',
]

PAD = 4  # pixels on each side, He et al., section 4.2


@dataclass(frozen=True)
class SplitSpec:
    """What a run reads."""
    source: DataSource
    batch_size: int
    train_split: str = 'train'
    val_split: str = 'validation'  # no validation if empty
    train_num_samples: Optional[int] = None  # of iterable splits
    val_num_samples: Optional[int] = None
    seed: int = 42
    repeats: float = 0.  # passes over the dataset in an epoch, if not 0


class Splits(NamedTuple):
    """Datasets of a run."""
    train: Any
    evaluation: Any  # None without validation

    @property
    def num_classes(self) -> Optional[int]:
        """Classes of the training split; None where it does not say."""
        indices = class_indices(self.train)
        return max(indices.values()) + 1 if indices else None

    @property
    def label_names(self) -> Optional[List[str]]:
        """Their names; None where it does not say."""
        return label_names(self.train)


@dataclass(frozen=True)
class DataSpec:
    """How images are augmented, and batches loaded."""
    loader: LoaderSpec  # of training
    eval_loader: LoaderSpec
    seed: int = 42
    augmentation: Optional[Dict[str, Any]] = None  # arguments of timm's `create_loader`
    mixup: Optional[Dict[str, Any]] = None  # arguments of timm's `Mixup`, empty for none
    pad: bool = False  # pad by 4 pixels and crop, instead of the random resized crop
    in_memory: bool = False  # decode both splits once, into the memory of the device
    size_given: bool = True  # the user has said an input size


@dataclass
class TrainData:
    """Loaders of a run, and the random number generators of their workers."""
    train_loader: Any
    eval_loader: Any  # None without validation
    mixes: bool  # mixup or cutmix is on
    mixup: Optional[Mixup]  # where the loader does not mix
    train_rng: Optional[RngTracker] = None
    eval_rng: Optional[RngTracker] = None

    def track(self, state: Dict[str, Any]) -> None:
        """Start to follow the generators of the workers, from a state that `states` has returned, or empty."""
        if isinstance(self.train_loader, InMemoryLoader):
            return  # it has neither workers nor a state
        self.train_rng = RngTracker(self.train_loader, state.get('train_workers'))
        if self.eval_loader is not None:
            self.eval_rng = RngTracker(self.eval_loader, state.get('eval_workers'))

    def states(self) -> Dict[str, Any]:
        """State of the generators of all workers."""
        return dict(
            train_workers=self.train_rng.states() if self.train_rng is not None else [],
            eval_workers=self.eval_rng.states() if self.eval_rng is not None else [],
        )

    def start_epoch(self, epoch: int, mixes: bool) -> None:
        """Shuffle for an epoch, and switch mixup off unless it mixes."""
        loader = self.train_loader
        if isinstance(loader, InMemoryLoader):
            loader.set_epoch(epoch)
        elif hasattr(loader.dataset, 'set_epoch'):
            loader.dataset.set_epoch(epoch)
        elif hasattr(loader.sampler, 'set_epoch'):
            loader.sampler.set_epoch(epoch)
        if not mixes and self.mixup is not None:
            self.mixup.mixup_enabled = False
        if not mixes and self.train_rng is not None:
            self.train_rng.disable_mixup()


def open_splits(spec: SplitSpec, in_chans: int, num_classes: Optional[int] = None) -> Splits:
    """Open both splits.

    Args:
        spec: What to read.
        in_chans: Channels that images are converted to.
        num_classes: Classes that the user has asked for, None if not.

    Raises:
        UserError: Missing or empty folder, more classes than asked for, or classes of the splits that differ.
    """
    common = dict(in_chans=in_chans, num_classes=num_classes, batch_size=spec.batch_size)
    train = open_dataset(
        spec.source, spec.train_split, num_samples=spec.train_num_samples, split_option='--train-split',
        is_training=True, seed=spec.seed, repeats=spec.repeats, **common)
    if not spec.val_split:
        return Splits(train, None)
    evaluation = open_dataset(
        spec.source, spec.val_split, num_samples=spec.val_num_samples, split_option='--val-split', is_training=False,
        **common)
    check_same_classes(train, evaluation)
    return Splits(train, evaluation)


def create_loaders(splits: Splits, spec: DataSpec, data_config: Dict[str, Any], placement: Placement) -> TrainData:
    """Loaders of both splits.

    Args:
        splits: As from `open_splits`.
        spec: Augmentation and batches.
        data_config: timm's data configuration of the network.
        placement: Where the images go.

    Raises:
        UserError: Not one whole batch, or what `--in-memory` does not do.
    """
    mixup = Mixup(**spec.mixup) if spec.mixup and not (spec.loader.prefetcher and not spec.in_memory) else None
    make = _in_memory_loaders if spec.in_memory else _ordinary_loaders
    train_loader, eval_loader = make(splits.train, splits.evaluation, spec, data_config, placement)
    return TrainData(train_loader, eval_loader, bool(spec.mixup), mixup)


def _ordinary_loaders(
        dataset: Any,
        eval_dataset: Any,
        spec: DataSpec,
        data_config: Dict[str, Any],
        placement: Placement,
) -> Tuple[Any, Any]:
    train_loader = create_train_loader(
        dataset, spec.loader, data_config, placement, spec.augmentation or {}, spec.mixup or {}, spec.pad,
        spec.size_given)
    if eval_dataset is None:
        return train_loader, None
    return train_loader, create_eval_loader(eval_dataset, spec.eval_loader, data_config, placement)


def _in_memory_loaders(
        dataset: Any,
        eval_dataset: Any,
        spec: DataSpec,
        data_config: Dict[str, Any],
        placement: Placement,
) -> Tuple[Any, Any]:
    augmentation = spec.augmentation or {}
    check_augmentation(augmentation, spec.pad)
    if len(dataset) // placement.world_size < spec.loader.batch_size:
        shared = f' for {placement.world_size} processes' if placement.distributed else ''
        raise UserError(
            f'--batch-size {spec.loader.batch_size}: the training split has only {len(dataset)} images{shared}')
    pad = PAD if spec.pad else 0
    common = dict(mean=data_config['mean'], std=data_config['std'])
    training_config = dict(data_config, interpolation=_interpolation(augmentation, data_config))
    images, targets = decode(
        dataset, training_config, placement, True, spec.loader.workers, pad, spec.size_given, 'Decode training images')
    hflip = 0. if augmentation.get('no_aug') else augmentation.get('hflip', 0.)
    train_loader = InMemoryLoader(
        images, targets, spec.loader.batch_size, placement, training=True, pad=pad, hflip=hflip, seed=spec.seed,
        **common)
    if eval_dataset is None:
        return train_loader, None
    images, targets = decode(
        eval_dataset, data_config, placement, False, spec.loader.workers, label='Decode validation images')
    return train_loader, InMemoryLoader(
        images, targets, spec.eval_loader.batch_size, placement, training=False, **common)


def create_train_loader(
        dataset: Any,
        spec: LoaderSpec,
        data_config: Dict[str, Any],
        placement: Placement,
        augmentation: Dict[str, Any],
        mixup: Dict[str, Any],
        pad: bool = False,
        size_given: bool = True,
) -> Any:
    """Training loader, which mixes if it has the prefetcher. Arguments as in `DataSpec` and `create_loaders`.

    Raises:
        UserError: Not one whole batch.
    """
    loader = load_batches(
        dataset,
        spec,
        data_config,
        placement,
        is_training=True,
        collate_fn=FastCollateMixup(**mixup) if mixup and spec.prefetcher else None,
        **augmentation,
    )
    if len(loader) == 0:  # incomplete batches are dropped
        raise UserError(f'--batch-size {spec.batch_size}: the training split has only {len(dataset)} images')
    if pad:
        _pad_and_crop(
            dataset.transform, tuple(data_config['input_size'][-2:]), _interpolation(augmentation, data_config),
            size_given)
    return loader


def _interpolation(augmentation: Dict[str, Any], data_config: Dict[str, Any]) -> str:
    """How images are resized that are not cropped at random scales: that of validation unless one is named."""
    named = augmentation.get('interpolation')
    return named if named not in (None, '', 'random') else data_config['interpolation']


def _pad_and_crop(transform: transforms.Compose, size: Tuple[int, int], interpolation: str, size_given: bool) -> None:
    """Replace the random resized crop in front of a training transform, in place."""
    scaled = transforms.Resize(size, transforms.InterpolationMode(interpolation)) if size_given else _Unscaled(size)
    transform.transforms[0] = transforms.Compose([scaled, transforms.RandomCrop(size, padding=PAD)])


class _Unscaled:
    """Transform that leaves an image as it is, after it has made sure of its size."""

    def __init__(self, size: Tuple[int, int]):
        self.size = size

    def __call__(self, image: Any) -> Any:
        check_size(image, self.size, '--train-crop-mode pad')
        return image
