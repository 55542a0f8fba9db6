"""Options of `timm-rla detect`, and what they say."""
import argparse
import re
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

from timm.utils import ParseKwargs

from ..common.device import check_device, default_device, default_workers
from ..common.errors import UserError
from ..common.options import OptionParser
from .coco import LAYOUTS, CocoSplit, find_layout, read_split
from .faster_rcnn import NECKS
from .schedule import Schedule

__all__ = [
    'add_checkpoint_options', 'add_data_options', 'detector_arguments', 'device', 'find_data',
    'read_data', 'schedule', 'train_parser',
]

PROPOSALS = {  # arguments of torchvision's Faster R-CNN: default, what --help says
    'rpn_pre_nms_top_n_train': (2000, 'boxes of a level before non-maximum suppression, in training'),
    'rpn_pre_nms_top_n_test': (1000, 'the same in evaluation'),
    'rpn_post_nms_top_n_train': (2000, 'proposals of an image, in training'),
    'rpn_post_nms_top_n_test': (1000, 'the same in evaluation'),
    'rpn_batch_size_per_image': (256, 'anchors of an image that the proposals are trained on'),
    'box_batch_size_per_image': (512, 'regions of an image that the boxes are trained on'),
    'box_positive_fraction': (0.25, 'part of them with an object'),
    'box_score_thresh': (0.05, 'detections below this score are dropped'),
    'box_nms_thresh': (0.5, 'overlap from which the lower of two detections is dropped'),
    'box_detections_per_img': (100, 'detections of an image'),
}


def device(name: str) -> str:
    """Type of --device. Lightning is told of a CPU or of GPUs of CUDA alone, and would take a CPU for all others.

    Raises:
        UserError: Another one, or a GPU that is not there.
    """
    if not re.fullmatch(r'cpu|cuda(:\d+)?', name):
        raise UserError(f'--device {name}: detectors run on cpu, on cuda, or on cuda:N, the GPU of that number')
    check_device(name)
    return name


def add_data_options(add: Callable[..., Any], splits: Tuple[str, ...]) -> None:
    """Options that say where images and annotations are; `add` is a parser's `add_argument`."""
    add('--data-dir', metavar='DIR', help='folder of the data set')
    add('--dataset', choices=LAYOUTS, help='its layout, found out if not given')
    for split in splits:
        add(f'--{split}-annotations', metavar='FILE', help=f'JSON file of the {split} split, instead of --data-dir')
        add(f'--{split}-images', metavar='DIR', help='folder of its images')
    add('--skip-missing', action='store_true', help='leave out images that are not there')
    add('--skip-unreadable', action='store_true', help='go on without images that cannot be read')
    add('-j', '--workers', type=int, default=default_workers(), metavar='N', help='data loading processes')


def add_checkpoint_options(add: Callable[..., Any]) -> None:
    """Options that name a trained detector; `add` is a parser's `add_argument`."""
    add('--checkpoint', metavar='FILE', required=True, help='checkpoint of timm-rla detect train')
    add('--device', type=device, default=default_device(), help='device to use: cpu, cuda or cuda:N')


def _add_detector(add: Callable[..., Any]) -> None:
    add('--backbone', default='rla_resnet50', metavar='NAME', help='network')
    add('--neck', default='fpn', choices=NECKS, help='feature pyramid, or last stage on each region')
    add('--pretrained', action='store_true', help='backbone with the weights that timm hosts')
    add('--pretrained-path', metavar='FILE', help='backbone with the weights of a checkpoint of classification')
    add('--trainable-layers', type=int, metavar='N',
        help='stages of the backbone that are trained, from the last one; 3 with pretrained weights, else 5, all')
    add('--no-frozen-bn', action='store_true', help='train the batch norms of the backbone, too')
    add('--backbone-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='arguments of the backbone')
    add('--anchor-sizes', nargs='+', type=int, default=[32, 64, 128, 256, 512], metavar='N',
        help='square roots of the areas of anchors, in pixels')
    add('--anchor-ratios', nargs='+', type=float, default=[0.5, 1.0, 2.0], metavar='R',
        help='height / width of anchors')
    add('--pyramid-channels', type=int, default=256, metavar='N', help='channels of the feature pyramid')
    add('--roi-size', type=int, default=7, metavar='N', help='height and width of the features of a region')
    add('--min-size', nargs='+', type=int, default=[800], metavar='N',
        help='short side that images are resized to; of several one is drawn in training, the last one taken later')
    add('--max-size', type=int, default=1333, metavar='N', help='limit of the long side')
    for name, (default, text) in PROPOSALS.items():
        add(f'--{name.replace("_", "-")}', type=type(default), default=default, metavar='N', help=text)


def _add_schedule(add: Callable[..., Any]) -> None:
    add('-b', '--batch-size', type=int, default=2, metavar='N', help='images of each process in a batch')
    add('--iterations', type=int, default=90_000, metavar='N', help='optimizer steps')
    add('--base-batch-size', type=int, metavar='N',
        help='images per iteration that iterations, milestones and learning rate are for: all are scaled to the '
             'images per iteration that there are')
    add('--accumulate', type=int, default=1, metavar='N', help='batches per iteration')
    add('--opt', default='sgd', metavar='OPTIMIZER', help="optimizer, any of timm's")
    add('--lr', type=float, default=0.02, help='learning rate')
    add('--milestones', nargs='*', type=int, default=[], metavar='N', help='iterations at which it falls')
    add('--gamma', type=float, default=0.1, help='factor by which it falls')
    add('--warmup-iterations', type=int, default=0, metavar='N', help='iterations over which it rises at first')
    add('--warmup-factor', type=float, default=0.001, help='factor that it rises from')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=1e-4, help='weight decay')
    add('--clip-grad', type=float, metavar='NORM', help='clip gradients')
    add('--hflip', type=float, default=0.5, metavar='PROB', help='probability of a horizontal flip')
    add('--model-ema', action='store_true', help='evaluate a moving average of the weights')
    add('--model-ema-decay', type=float, default=0.9998, metavar='DECAY', help='its decay')


def _add_run(add: Callable[..., Any]) -> None:
    add('--seed', type=int, default=42, help='random seed')
    add('--eval-interval', type=int, default=5_000, metavar='N', help='iterations between evaluations')
    add('--checkpoint-interval', type=int, default=1_000, metavar='N', help='iterations between checkpoints')
    add('--log-interval', type=int, default=50, metavar='N', help='iterations between log lines')
    add('--device', type=device, default=default_device(), help='device to use: cpu, cuda or cuda:N')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--output', default='output/detect', metavar='DIR', help='folder of all runs')
    add('--experiment', default='', metavar='NAME', help='folder of this run therein, by date and backbone if empty')
    add('--resume', default='', metavar='FILE', help="go on from a checkpoint; 'auto': from the last one of the run")
    add('--log-tensorboard', action='store_true', help="log metrics for TensorBoard, into the run's folder")


def train_parser() -> OptionParser:
    """Parser of `timm-rla detect train`."""
    parser = OptionParser(
        prog='timm-rla detect train',
        description='Train Faster R-CNN on images annotated in the format of COCO.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with option names and values')
    add_data_options(parser.add_argument_group('Data').add_argument, ('train', 'val'))
    for title, add_options in (('Detector', _add_detector), ('Schedule', _add_schedule), ('Run', _add_run)):
        add_options(parser.add_argument_group(title).add_argument)
    return parser


# What they say -----------------------------------------------------------------------------------------------------

def find_data(args: argparse.Namespace, split: str) -> Tuple[Path, Path, str]:
    """File of annotations and folder of images of a split, 'train' or 'val', and the option that named them.

    Raises:
        UserError: `add_data_options` tell neither, or both ways.
    """
    named = {name: [getattr(args, f'{name}_{part}') for part in ('annotations', 'images')]
             for name in ('train', 'val') if hasattr(args, f'{name}_annotations')}
    for option in ('data_dir', 'dataset'):
        if getattr(args, option) and all(None not in parts for parts in named.values()):
            raise UserError(f'--{option.replace("_", "-")} {getattr(args, option)}: one of the two, it or '
                            f'{" and ".join(f"--{name}-annotations" for name in named)} with the images')
    annotations, images = named[split]
    option = f'--{split}-annotations'
    if annotations is None or images is None:
        if (annotations, images) != (None, None):
            raise UserError(f'--{split}-annotations and --{split}-images: only one of them is given')
        if not args.data_dir:
            raise UserError(f'--data-dir: not given, nor {option} and --{split}-images')
        layout = LAYOUTS[args.dataset or find_layout(Path(args.data_dir))]
        annotations, images = layout.paths(Path(args.data_dir), getattr(layout, split))
        option = '--data-dir'
    return Path(annotations), Path(images), option


def read_data(args: argparse.Namespace, split: str) -> CocoSplit:
    """A split, 'train' or 'val', that `add_data_options` tell.

    Raises:
        UserError: It is not named, or not there, or not in the format of COCO.
    """
    return read_split(*find_data(args, split), args.skip_missing)


def detector_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of `fasterrcnn` that say what the detector is, as they go into checkpoints."""
    return dict(
        backbone=args.backbone,
        neck=args.neck,
        frozen_bn=not args.no_frozen_bn,
        backbone_kwargs=args.backbone_kwargs,
        anchor_sizes=tuple(args.anchor_sizes),
        anchor_ratios=tuple(args.anchor_ratios),
        roi_size=args.roi_size,
        pyramid_channels=args.pyramid_channels,
        min_size=tuple(args.min_size),
        max_size=args.max_size,
        **{name: getattr(args, name) for name in PROPOSALS},
    )


def schedule(args: argparse.Namespace, batch_size: int) -> Schedule:
    """The schedule for so many images per iteration."""
    given = Schedule(
        args.iterations, args.lr, tuple(args.milestones), args.gamma, args.warmup_iterations, args.warmup_factor,
        args.opt, args.momentum, args.weight_decay)
    return given.scaled(args.base_batch_size, batch_size) if args.base_batch_size else given
