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
from .progress import Progress

__all__ = ['InMemoryLoader', 'check_augmentation', 'decode']

DECODE_BATCH = 256
# What a training transform of this road may contain: arguments of timm's `create_loader` and their neutral values
NEUTRAL: Dict[str, Tuple[Any, ...]] = {
    're_prob': (0,), 'vflip': (0,), 'color_jitter': (0, None), 'grayscale_prob': (0, None),
    'gaussian_blur_prob': (0, None), 'auto_augment': (None, ''), 'num_aug_repeats': (0,),
}
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
    if augmentation.get('no_aug'):
        return
    if not pad:
        raise UserError('--in-memory: has no random resized crop; --train-crop-mode pad or --no-aug')
    for name, neutral in NEUTRAL.items():
        if augmentation.get(name) not in neutral:
            option = OPTIONS.get(name, name).replace('_', '-')
            raise UserError(f'--in-memory: has no --{option} {augmentation[name]}; leave --in-memory out, or set '
                            f'--{option} to {neutral[0]}')


def _available_memory(device: torch.device) -> Optional[int]:
    """Bytes that are free on a device; None where nobody can tell."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    names = os.sysconf_names if device.type == 'cpu' and hasattr(os, 'sysconf') else {}
    if 'SC_AVPHYS_PAGES' in names and 'SC_PAGE_SIZE' in names:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return None


def _to_array(image: Any) -> np.ndarray:
    """PIL image or array [C, H, W] -> uint8 array [H, W, C]"""
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def _collate(batch: List[Tuple[np.ndarray, int]]) -> Tuple[List[torch.Tensor], torch.Tensor]:
    return [torch.from_numpy(image.copy()) for image, _ in batch], torch.tensor([target for _, target in batch])


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
    needed, free = int(np.prod(shape, dtype=np.int64)), _available_memory(placement.device)
    if free is not None and needed > 0.9 * free:
        raise UserError(f'--in-memory: {len(dataset):,} images need {needed / 2 ** 20:,.0f} MiB, of which '
                        f'{free / 2 ** 20:,.0f} MiB are free on {placement.device}')
    if training:
        resize = transforms.Resize((height, width), transforms.InterpolationMode(data_config['interpolation']))
    else:
        resize = transforms.Compose(create_transform(
            (channels, height, width), is_training=False, use_prefetcher=True,
            interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'],
            crop_mode=data_config.get('crop_mode')).transforms[:-1])  # all but the conversion to [C, H, W]
    dataset.transform = _Decoder(resize, None if size_given else (height, width))

    images = torch.zeros(shape, dtype=torch.uint8)
    targets = torch.empty(len(dataset), dtype=torch.long)
    loader = DataLoader(dataset, DECODE_BATCH, num_workers=workers, collate_fn=_collate)
    done = 0
    with Progress(label, len(loader), interval=max(1, len(loader) // 4), enabled=placement.primary) as progress:
        for batch, batch_targets in loader:
            for image in batch:
                images[done, pad:pad + height, pad:pad + width] = image
                done += 1
            targets[done - len(batch):done] = batch_targets
            progress.update(len(batch))
    return images.to(placement.device), targets.to(placement.device)


class _Decoder:
    """Transform that resizes an image, after it has made sure that it has the size that all have."""

    def __init__(self, resize: Any, size: Optional[Tuple[int, int]]):
        self.resize = resize
        self.size = size

    def __call__(self, image: Any) -> np.ndarray:
        if self.size is not None and (image.height, image.width) != self.size:
            raise UserError(f'--in-memory: an image of {image.width} x {image.height} pixels, where the network takes '
                            f'{self.size[1]} x {self.size[0]}; --img-size N scales all images')
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
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(count, generator=generator) if self.training else torch.arange(count)
        order = order.repeat(2)[place.rank:self._share() * place.world_size:place.world_size]
        generator = _generator(self.seed, self.epoch, place.rank)
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
