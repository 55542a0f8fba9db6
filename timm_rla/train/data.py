"""Datasets and loaders: timm's own, with every sample checked and CIFAR's pad-and-crop added."""
import argparse
import os
from typing import Any, Dict, Optional, Tuple

import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from torchvision import transforms

from ..errors import UserError, blame

__all__ = ['PAD', 'StrictImageDataset', 'create_eval_loader', 'create_train_loader', 'is_mixing', 'num_dataset_classes']

PAD = 4  # pixels on each side, He et al., section 4.2


class StrictImageDataset(ImageDataset):
    """timm's ImageDataset, where an image that cannot be read is an error that names it, not one that is skipped."""

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        try:
            file, target = self.reader[index]
            image = Image.open(file)
            image = image.convert(self.input_img_mode) if self.input_img_mode else image
        except Exception as e:  # PIL raises whatever its decoders raise
            raise UserError(f'cannot read image {self.filename(index, absolute=True)}: {e}') from e
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


SPLIT_SYNONYMS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'eval', 'evaluation')}


def _check_folder(root: Optional[str], split: str, need_split: bool) -> None:
    """An image folder must be there and, for training, hold its splits: where not, timm takes the root for each."""
    if not root:
        raise UserError('--data-dir: not given, where is the dataset?')
    if not os.path.exists(root):
        raise UserError(f'--data-dir {root}: no such folder')
    if os.path.isfile(root):
        return
    names = next((names for names in SPLIT_SYNONYMS.values() if split in names), (split,))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not folders or (need_split and not set(names) & set(folders)):
        found = f'holds {", ".join(folders[:5])}' if folders else 'holds no folders'
        raise UserError(f'--data-dir {root}: {found}, where a folder {" or ".join(names)} is expected')


def _create_dataset(
        args: argparse.Namespace,
        split: str,
        in_chans: int,
        num_samples: Optional[int],
        need_split: bool,
        **kwargs: Any,
) -> Any:
    if not args.dataset:
        _check_folder(args.data_dir, split, need_split)
    with blame(f'--dataset {args.dataset}' if args.dataset else f'--data-dir {args.data_dir}'):
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    if type(dataset) is ImageDataset:
        dataset = StrictImageDataset(args.data_dir, reader=dataset.reader, input_img_mode=dataset.input_img_mode)
    _check_classes(dataset, args.num_classes)
    return dataset


def num_dataset_classes(dataset: Any) -> Optional[int]:
    """Number of classes of a dataset, None where it does not say."""
    class_to_idx = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return max(class_to_idx.values()) + 1 if class_to_idx else None


def _check_classes(dataset: Any, num_classes: int) -> None:
    found = num_dataset_classes(dataset)
    if found is not None and found > num_classes:
        raise UserError(f'--num-classes {num_classes}: the dataset has {found} classes')


def _check_same_classes(train: Any, evaluation: Any) -> None:
    """Class indices come from sorted folder names: a class that only one split has would shift the others silently."""
    classes = [getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) for dataset in (train, evaluation)]
    if all(classes) and classes[0] != classes[1]:
        differ = sorted(set(classes[0].items()) ^ set(classes[1].items()))
        raise UserError(f'--data-dir: classes of the splits differ, first in {differ[0][0]!r}; a --class-map can say '
                        'which index each class has')


def is_mixing(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on; targets are then smooth when they come from the loader."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _mixup_args(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of timm's mixup, empty if neither mixup nor cutmix is on."""
    if not is_mixing(args):
        return {}
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def _common_loader_args(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        device=device,
        distributed=args.distributed,
        use_prefetcher=args.prefetcher,
        persistent_workers=args.workers > 0,  # timm's default, which before 1.0.29 failed without workers
    )


def _pad_and_crop(transform: transforms.Compose, size: Tuple[int, int], interpolation: str) -> None:
    """Replace the random resized crop in front of a training transform, in place."""
    transform.transforms[0] = transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode(interpolation)),  # nothing to do for images of that size
        transforms.RandomCrop(size, padding=PAD),
    ])


def create_train_loader(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
) -> Tuple[Any, Optional[Mixup]]:
    """Training loader, and the mixup that is left to the training loop (without the prefetcher).

    Raises:
        UserError: Missing or empty folder, more classes than the model has.
    """
    dataset = _create_dataset(
        args,
        args.train_split,
        data_config['input_size'][0],
        args.train_num_samples,
        need_split=True,
        is_training=True,
        seed=args.seed,
        repeats=args.epoch_repeats,
    )

    mixup_args = _mixup_args(args)
    pad = args.train_crop_mode == 'pad' and not args.no_aug
    with blame('data loader'):
        loader = create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=None if pad else args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=args.train_interpolation if not args.no_aug and args.train_interpolation
            else data_config['interpolation'],
            num_workers=args.workers,
            collate_fn=FastCollateMixup(**mixup_args) if mixup_args and args.prefetcher else None,
            worker_seeding=args.worker_seeding,
            **_common_loader_args(args, data_config, device),
        )
    if len(loader) == 0:  # incomplete batches are dropped
        raise UserError(f'--batch-size {args.batch_size}: the training split has only {len(dataset)} images')
    if pad:
        _pad_and_crop(dataset.transform, tuple(data_config['input_size'][-2:]), data_config['interpolation'])
    return loader, Mixup(**mixup_args) if mixup_args and not args.prefetcher else None


def create_eval_loader(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        split: str,
        batch_size: int,
        num_samples: Optional[int] = None,
        train_dataset: Any = None,
        **kwargs: Any,
) -> Any:
    """Validation loader; `kwargs` are further arguments of timm's `create_loader`.

    Raises:
        UserError: Missing or empty folder, more classes than the model has, other classes than the training split.
    """
    dataset = _create_dataset(
        args,
        split,
        data_config['input_size'][0],
        num_samples,
        need_split=train_dataset is not None,
        is_training=False,
    )
    if train_dataset is not None:
        _check_same_classes(train_dataset, dataset)
    # with more workers the readers of these formats pad a distributed validation
    workers = min(2, args.workers) if args.distributed and args.dataset.startswith(('tfds', 'wds')) else args.workers
    with blame('data loader'):
        return create_loader(
            dataset,
            batch_size=batch_size,
            is_training=False,
            interpolation=data_config['interpolation'],
            num_workers=workers,
            crop_pct=data_config['crop_pct'],
            **kwargs,
            **_common_loader_args(args, data_config, device),
        )
