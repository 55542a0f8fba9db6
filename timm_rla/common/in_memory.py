"""The fast road for small images: the whole data set as one uint8 tensor on the device, augmented there in batches.

For images as small as CIFAR's, decoding and augmenting one by one takes longer than training on them. Here each image
is decoded once. Pad-and-crop, flip and normalisation of a batch are then one gather and one affine map.
"""
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from .device import Placement
from .errors import UserError
from .pixels import check_size
from .progress import Progress
from .stopping import leave_signals

__all__ = ['InMemoryLoader', 'check_augmentation', 'decode']

MEMINFO = '/proc/meminfo'

DECODE_BATCH = 256
# What a training transform of this road may contain: arguments of timm's `create_loader` and their neutral values
NEUTRAL: Dict[str, Tuple[Any, ...]] = {
    're_prob': (0,), 'vflip': (0,), 'color_jitter': (0, None), 'grayscale_prob': (0, None),
    'gaussian_blur_prob': (0, None), 'auto_augment': ('', None), 'num_aug_repeats': (0,),
}
SAMPLING = ('num_aug_repeats',)  # also without augmentation
SHUFFLING, CROPPING = 1, 2  # purposes of random numbers; none is 0, with which NumPy fills up what it is given
OPTIONS = {  # their options, where these have other names
    're_prob': 'reprob', 'auto_augment': 'aa', 'num_aug_repeats': 'aug_repeats',
}


def check_augmentation(augmentation: Dict[str, Any], pad: bool) -> None:
    """Complain of an augmentation that this road does not have.

    Args:
        augmentation: Arguments of timm's `create_loader`.
        pad: Pad and crop.

    Raises:
        UserError: There is one; names its option.
    """
    without = augmentation.get('no_aug')
    if not pad and not without:
        raise UserError('--in-memory: has no random resized crop; --train-crop-mode pad or --no-aug')
    for name, neutral in NEUTRAL.items():
        if augmentation.get(name) not in neutral and (name in SAMPLING or not without):
            option = OPTIONS.get(name, name).replace('_', '-')
            raise UserError(f'--in-memory: has no --{option} {augmentation[name]}; leave --in-memory out, or set '
                            f'--{option} to {neutral[0]!r}')


def _available_memory(device: torch.device) -> Optional[int]:
    """Bytes that are free on a device; None where nobody can tell."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if device.type != 'cpu' or not os.path.exists(MEMINFO):
        return None
    with open(MEMINFO, encoding='ascii') as f:
        kib = {name: int(value.split()[0]) for name, value in (line.split(':') for line in f)}
    return 1024 * kib['MemAvailable'] if 'MemAvailable' in kib else None  # with what the system gives up when asked


def _check_memory(needed: int, images: int, placement: Placement) -> None:
    """Complain, in all processes alike, of a data set that does not fit into memory.

    Raises:
        UserError: It does not.
    """
    shares = placement.distributed and placement.device.type == 'cpu'
    sharing = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if shares else 1
    known = [free for free in placement.gather([_available_memory(placement.device)]) if free is not None]
    if known and sharing * needed > 0.9 * min(known):
        by = f' in each of {sharing} processes' if sharing > 1 else ''
        raise UserError(f'--in-memory: {images:,} images need {needed / 2 ** 20:,.0f} MiB{by}, of which '
                        f'{min(known) / 2 ** 20:,.0f} MiB are free on {placement.device}')


def _to_array(image: Any) -> np.ndarray:
    """PIL image or array [C, H, W] -> uint8 array [H, W, C]"""
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def _collate(batch: List[Tuple[np.ndarray, int]]) -> Tuple[torch.Tensor, torch.Tensor]:
    """One tensor for all images: each tensor that a worker sends is an open file."""
    return torch.from_numpy(np.stack([image for image, _ in batch])), torch.tensor([target for _, target in batch])


def decode(
        dataset: Any,
        data_config: Dict[str, Any],
        placement: Placement,
        training: bool,
        workers: int = 0,
        pad: int = 0,
        size_given: bool = True,
        label: str = 'Decode',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Decode a data set into memory.

    Args:
        dataset: Map-style data set of timm; its transform is replaced.
        data_config: timm's data configuration of the network.
        placement: Where the images go.
        training: Resize to the input size as it is; else resize and crop the centre as timm does in validation.
        workers: Processes that decode.
        pad: Black pixels on each side, for pad-and-crop.
        size_given: The user has said an input size. Without one, all images must have the same.
        label: What the progress is shown as.

    Returns:
        Images, uint8 [n, H + 2 pad, W + 2 pad, C], and targets [n], on the device.

    Raises:
        UserError: A data set that is not map-style, is empty, would not fit into memory, or has images of unequal size.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__getitem__'):
        raise UserError('--in-memory: needs a data set with random access, not one that is read as a stream')
    channels, height, width = data_config['input_size']
    shape = (len(dataset), height + 2 * pad, width + 2 * pad, channels)
    _check_memory(int(np.prod(shape, dtype=np.int64)), len(dataset), placement)
    if training:
        resize = transforms.Resize((height, width), transforms.InterpolationMode(data_config['interpolation']))
    else:
        resize = transforms.Compose(create_transform(
            (channels, height, width), is_training=False, use_prefetcher=True,
            interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'],
        ).transforms[:-1])  # all but the conversion to [C, H, W]
    dataset.transform = _Decoder(resize, None if size_given else (height, width))

    images = torch.zeros(shape, dtype=torch.uint8, device=placement.device)
    targets = torch.empty(len(dataset), dtype=torch.long, device=placement.device)
    loader = DataLoader(
        dataset, DECODE_BATCH, num_workers=workers, collate_fn=_collate, worker_init_fn=leave_signals)
    done = 0
    with Progress(label, len(loader), interval=max(1, len(loader) // 4), enabled=placement.primary) as progress:
        for batch, batch_targets in loader:
            rows = slice(done, done + len(batch))
            images[rows, pad:pad + height, pad:pad + width] = batch.to(placement.device)
            targets[rows] = batch_targets.to(placement.device)
            done += len(batch)
            progress.update(len(batch))
    return images, targets


class _Decoder:
    """Transform that resizes an image, after it has made sure that it has the size that all have."""

    def __init__(self, resize: Any, size: Optional[Tuple[int, int]]):
        self.resize = resize
        self.size = size

    def __call__(self, image: Any) -> np.ndarray:
        if self.size is not None:
            check_size(image, self.size, '--in-memory')
        return _to_array(self.resize(image))


def _generator(*numbers: int) -> torch.Generator:
    """Generator whose stream belongs to these numbers alone."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


class InMemoryLoader:
    """Batches out of a data set in memory, normalised, in the type and layout of the model.

    The random numbers of an epoch depend on seed, epoch and process alone, so that a run goes on bit for bit without a
    state of its own.

    Args:
        images: uint8 [n, H + 2 pad, W + 2 pad, C].
        targets: [n].
        batch_size: Images in a batch of this process.
        placement: Device, type and layout of the batches; process and number of processes.
        mean: Mean pixel value per channel, in [0, 1].
        std: Standard deviation per channel.
        training: Shuffle, crop and flip, and drop the last batch if it is not whole. Else all images in order.
        pad: Pixels of padding on each side.
        hflip: Probability of a horizontal flip, in training.
        seed: Seed of order and augmentation.
    """

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            placement: Placement,
            mean: Sequence[float],
            std: Sequence[float],
            training: bool,
            pad: int = 0,
            hflip: float = 0.,
            seed: int = 0,
    ):
        self.images = images
        self.targets = targets
        self.batch_size = batch_size
        self.placement = placement
        self.training = training
        self.pad = pad
        self.hflip = hflip
        self.seed = seed
        self.epoch = 0
        scale = dict(dtype=torch.float32, device=images.device)
        self.mean = 255 * torch.tensor(mean, **scale)
        self.std = 255 * torch.tensor(std, **scale)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch."""
        self.epoch = epoch

    def _share(self) -> int:
        """Images of this process in an epoch: as many in each, in validation some twice."""
        count, world = len(self.images), self.placement.world_size
        return count // world if self.training else -(-count // world)

    def __len__(self) -> int:
        share = self._share()
        return share // self.batch_size if self.training else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        count, place = len(self.images), self.placement
        generator = _generator(self.seed, self.epoch, SHUFFLING)
        order = torch.randperm(count, generator=generator) if self.training else torch.arange(count)
        order = order[torch.arange(place.rank, self._share() * place.world_size, place.world_size) % count]
        generator = _generator(self.seed, self.epoch, CROPPING, place.rank)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start:start + self.batch_size]
            yield self._batch(index, *self._windows(len(index), generator))

    def _windows(self, count: int, generator: torch.Generator) -> Tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns, [B, H] and [B, W], of each image's window."""
        height, width = (size - 2 * self.pad for size in self.images.shape[1:3])
        rows, columns = (torch.arange(size).expand(count, -1) for size in (height, width))
        if not self.training:
            return rows + self.pad, columns + self.pad
        top, left = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        flip = torch.rand(count, 1, generator=generator) < self.hflip
        return rows + top, torch.where(flip, width - 1 - columns, columns) + left

    def _batch(
            self,
            index: torch.Tensor,
            rows: torch.Tensor,
            columns: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        index, rows, columns = (x.to(self.images.device, non_blocking=True) for x in (index, rows, columns))
        pixels = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
        images = ((pixels - self.mean) / self.std).to(self.placement.dtype).permute(0, 3, 1, 2)
        if not self.placement.channels_last:
            images = images.contiguous()
        return images, self.targets[index]
