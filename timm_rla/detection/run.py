"""A training run of a detector in its folder, and the evaluation of a trained one."""
import argparse
import errno
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchvision.models.detection import FasterRCNN

from ..common.checkpoint import read_checkpoint
from ..common.device import mixed_precision
from ..common.errors import UserError, blame, one_line
from ..common.files import folder_of_run, replacing
from ..common.idle import warn_of_idle_options
from ..common.lock import exclusive
from ..common.stopping import Stopped, StopRequest
from .callbacks import Best, CheckpointFiles, Checkpoints, Lines, SameCheckpoint
from .checkpoint import TrainedDetector, go_back
from .coco import CocoSplit, describe_split, training_boxes
from .data import DetectionData
from .faster_rcnn import fasterrcnn
from .module import Detection
from .options import detector_arguments, read_data, schedule, train_parser
from .resume import find_checkpoint, holds

__all__ = ['evaluate', 'train']

_logger = logging.getLogger(__name__)

PRECISIONS = {'float16': '16-mixed', 'bfloat16': 'bf16-mixed'}  # Lightning's names


def _processes() -> int:
    return int(os.environ.get('WORLD_SIZE', 1))  # of torchrun


def _trainer(device: str, **kwargs: Any) -> pl.Trainer:
    """A trainer on a device, with all the processes of torchrun."""
    for name in ('lightning.pytorch', 'lightning.fabric'):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
            'Checkpoint directory .* exists', r'.isinstance\(treespec, LeafSpec\)', '.*does not have many workers',
            '.*resuming from a checkpoint that ended before the epoch', '.*callbacks used to create the checkpoint'):
        warnings.filterwarnings('ignore', message)
    local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    index = torch.device(device).index
    if index is not None and _processes() > 1:
        raise UserError(f'--device {device}: each process of torchrun takes a GPU of its own; --device cuda')
    return pl.Trainer(
        accelerator='gpu' if device.startswith('cuda') else 'cpu',
        devices=[index] if index is not None else local,
        num_nodes=max(1, _processes() // local),
        strategy='ddp' if _processes() > 1 else 'auto',
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        **kwargs,
    )


def train(args: argparse.Namespace) -> Path:
    """Train as the options say.

    Args:
        args: As from `train_parser` and `parse`.

    Returns:
        Folder of the run.

    Raises:
        UserError: Bad input; nothing has been written then.
    """
    with StopRequest(at_once=True) as stop:
        return _train(args, stop)


def _train(args: argparse.Namespace, stop: StopRequest) -> Path:
    splits = {split: read_data(args, split) for split in ('train', 'val')}
    if splits['train'].names != splits['val'].names or splits['train'].category_ids != splits['val'].category_ids:
        raise UserError('categories of the two splits differ: ' + ' and '.join(
            ', '.join(f'{number} {name}' for number, name in zip(split.category_ids, split.names))
            for split in splits.values()))
    torch.manual_seed(args.seed)
    subject = f'--backbone {args.backbone}'
    if args.pretrained_path:
        read_checkpoint(args.pretrained_path, '--pretrained-path')
        subject += f' --pretrained-path {args.pretrained_path}'
    with blame(subject, AssertionError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError):
        detector = fasterrcnn(
            num_classes=len(splits['train'].names) + 1, pretrained=args.pretrained_path or args.pretrained,
            trainable_layers=args.trainable_layers, **detector_arguments(args))
    for split in splits.values():
        _check_images(split, detector)
    batch_size = args.batch_size * args.accumulate * _processes()
    plan = schedule(args, batch_size)
    plan.optimizer(detector)  # complains now, before there is a folder
    folder = folder_of_run(
        args.output, args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.backbone}-{args.neck}')
    with blame('--data-dir', ValueError):  # more categories than there may be
        module = Detection(detector, splits['train'], plan, args.seed, folder)
    data = DetectionData(
        splits['train'], splits['val'], args.batch_size, args.workers, args.seed, args.hflip, args.skip_unreadable)
    if int(os.environ.get('RANK', 0)):
        _fit(args, module, data, folder, stop)
        return folder
    warn_of_idle_options(args, train_parser())
    _describe(splits, detector)
    _logger.info(f'{batch_size} images per iteration, {plan}')
    with exclusive(folder, lambda holder: f'--experiment {folder}: another run writes here ({holder})'):
        _fit(args, module, data, folder, stop)
    return folder


def _check_images(split: CocoSplit, detector: FasterRCNN) -> None:
    """Complain of an image so thin that nothing is left of it in the size that the detector takes."""
    largest = detector.transform.max_size
    for entry in split.images:
        short, long = sorted((entry.width, entry.height))
        if largest * short < long:
            raise UserError(f'{entry.path}: {entry.width} x {entry.height} pixels; with a long side of {largest}, as '
                            '--max-size has it, the short one has none')


def _describe(splits: Dict[str, CocoSplit], detector: FasterRCNN) -> None:
    left_out = sum(len(entry.labels) - len(training_boxes(entry)[1]) for entry in splits['train'].images)
    _logger.info(describe_split('train', splits['train'], left_out))
    _logger.info(describe_split('val', splits['val']))
    count = sum(p.numel() for p in detector.parameters())
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    name = '{neck}, {backbone}'.format_map(detector.arguments)
    _logger.info(f'Faster R-CNN, {name}: {count:,} parameters, {trained:,} trained')


def _fit(args: argparse.Namespace, module: Detection, data: DetectionData, folder: Path, stop: StopRequest) -> None:
    plan = module.schedule
    checkpoint, step = find_checkpoint(args, folder, module)
    if step >= plan.iterations:
        _logger.warning(f'Nothing is left to do: {checkpoint} is at iteration {step} of {plan.iterations}')
    eval_interval = min(args.eval_interval, plan.iterations)
    best = Best(folder)
    average = [EMAWeightAveraging(decay=args.model_ema_decay)] * args.model_ema
    callbacks: List[pl.Callback] = [
        *average,  # before the checkpoints, which then have the average of their own iteration
        Lines(args.log_interval),
        Checkpoints(folder, args.checkpoint_interval, eval_interval, stop),
        best,
        SameCheckpoint(checkpoint),
    ]
    trainer = _trainer(
        args.device,
        max_steps=plan.iterations,
        max_epochs=1,  # of as many batches as there are iterations
        val_check_interval=eval_interval * args.accumulate,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip_grad,
        precision=PRECISIONS[mixed_precision(args.amp_dtype, args.device)] if args.amp else '32-true',
        log_every_n_steps=min(args.log_interval, plan.iterations * args.accumulate),
        logger=_loggers(folder, args.log_tensorboard),
        callbacks=callbacks,
        plugins=[CheckpointFiles(args.accumulate)],
        default_root_dir=folder,
    )
    if trainer.is_global_zero:
        best.found = _open(folder, vars(args), checkpoint, step)
    stop.remember()
    with _as_elsewhere(trainer), _blame_folder(folder):
        trainer.fit(module, data, ckpt_path=checkpoint)
        if trainer.global_step % eval_interval:
            trainer.validate(module, data, verbose=False)
            if best.best_model_score is None or module.numbers['map'] > best.best_model_score:
                trainer.save_checkpoint(folder / 'best.ckpt')
    if trainer.is_global_zero and module.numbers:
        _logger.info(f'Finished: mAP@.5 {module.numbers["map_50"]:.4f}, mAP@[.5,.95] {module.numbers["map"]:.4f}; '
                     f'{folder / "best.ckpt"} is the best checkpoint')


@contextmanager
def _as_elsewhere(trainer: pl.Trainer) -> Iterator[None]:
    """Let a request to stop and Ctrl-C, which Lightning has words of its own for, end a run as those of classifiers."""
    try:
        yield
    except SIGTERMException as e:  # where Lightning looks before `Checkpoints`: right behind an evaluation
        raise Stopped(f'stopped after {trainer.global_step} iterations; --resume auto goes on') from e
    except SystemExit as e:
        if isinstance(e.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from e
        raise


@contextmanager
def _blame_folder(folder: Path) -> Iterator[None]:
    """Say in a line what Lightning's loggers raise for the folder: another file in it, or a full disk."""
    try:
        yield
    except OSError as e:
        inside = e.filename is not None and folder.absolute() in Path(os.fsdecode(e.filename)).absolute().parents
        if inside or e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f'{folder}: {one_line(e)}') from e
        raise


def _loggers(folder: Path, tensorboard: bool) -> List[Any]:
    loggers: List[Any] = [CSVLogger(folder, name='logs')]
    if tensorboard:
        loggers.append(TensorBoardLogger(folder, name='tensorboard', version=''))
    return loggers


def _open(folder: Path, options: Dict[str, Any], checkpoint: Optional[Path], step: int) -> Optional[float]:
    """Begin to write, or bring a run into the state of its checkpoint; the mAP of best.ckpt if there is one."""
    with blame(str(folder), OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / 'args.yaml') as temporary:
            temporary.write_text(yaml.safe_dump(options))
    if checkpoint is None:
        return None
    _logger.info(f'Going on from {checkpoint}, after {step} iterations')
    with blame(str(folder), OSError):
        return go_back(folder, checkpoint, step) if holds(folder, str(checkpoint)) else None


def evaluate(
        detector: TrainedDetector,
        split: CocoSplit,
        device: str,
        workers: int,
        skip_unreadable: bool = False,
) -> Detection:
    """The numbers of COCO for a detector.

    Args:
        detector: As from `load_detector`.
        split: Images with the categories of its training.
        device: Device, as timm names it.
        workers: Processes that load images.
        skip_unreadable: Leave out images that cannot be read.

    Returns:
        Module with `numbers` and `results`.

    Raises:
        UserError: An image cannot be read, or not be resized.
    """
    _check_images(split, detector.model)
    module = Detection(detector.model, split)
    data = DetectionData(None, split, workers=workers, skip_unreadable=skip_unreadable)
    trainer = _trainer(device, logger=False, enable_checkpointing=False, callbacks=[Lines(50)])
    with _as_elsewhere(trainer):
        trainer.validate(module, data, verbose=False)
    return module
