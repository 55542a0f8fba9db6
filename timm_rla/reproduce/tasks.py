"""The kinds of runs that tables consist of: training a classifier, training a detector. What differs, as data."""
import argparse
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ..common.errors import blame
from ..common.extras import import_extra
from ..common.networks import build_model
from ..common.options import OptionParser, input_spec
from ..detection import fasterrcnn, options
from ..train.data import open_splits
from ..train.options import split_spec, train_parser
from ..train.setup import create_schedule

__all__ = ['DATASETS', 'Metric', 'TASKS', 'Task']


@dataclass(frozen=True)
class Metric:
    """A figure of a run, in percent: `offset + factor * column`."""
    key: str  # in reports, and where a table has several figures of the paper
    name: str
    column: str  # of summary.csv
    factor: float
    offset: float = 0.
    lower_is_better: bool = False

    def value(self, row: Dict[str, float]) -> float:
        """Of a row of summary.csv."""
        return self.offset + self.factor * row[self.column]


@dataclass(frozen=True)
class Task:
    """A kind of runs."""
    command: Tuple[str, ...]  # of timm-rla
    parser: Callable[[], OptionParser]  # of its options
    network: str  # option that names the network
    unit: str  # 'epoch' or 'iteration': --epochs or --iterations is the length of a run
    first_row: int  # number of the first epoch or iteration in summary.csv
    measure: str  # what the metrics are, in one word
    metrics: Tuple[Metric, ...]
    length: Callable[[argparse.Namespace], int]  # number of the last row that options lead to, counted from 1
    scaled_steps: Callable[[argparse.Namespace, float], Dict[str, Any]]  # of the schedule, times a ratio
    parameters: Callable[[argparse.Namespace, int], int]  # of a network for so many classes
    classes: Callable[[argparse.Namespace], Optional[int]]  # of the data that options name; None where it does not say

    def scaled_schedule(self, args: argparse.Namespace, length: int) -> Dict[str, Any]:
        """Options of the schedule's steps, in proportion to the length of a run; those that change.

        Args:
            args: Options of the recipe.
            length: Length of the run.
        """
        steps = self.scaled_steps(args, length / getattr(args, f'{self.unit}s'))
        return {name: value for name, value in steps.items() if value != getattr(args, name)}

    def is_whole(self, row: Dict[str, float]) -> bool:
        """True if a row of summary.csv has the training loss, and each metric with a value that can be."""
        return 'train_loss' in row and all(
            metric.column in row and 0 <= round(metric.value(row), 6) <= 100 for metric in self.metrics)

    def done(self, row: Dict[str, float]) -> int:
        """Epochs or iterations after which a row of summary.csv was written."""
        return int(row['epoch']) + 1 - self.first_row


def _classifier_length(args: argparse.Namespace) -> int:
    """As the run itself counts: timm adds cooldown, cycles and a warm-up that is a prefix to --epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
    return int(create_schedule(optimizer, args, args.eval_metric, updates_per_epoch=1)[1])


def _classifier_steps(args: argparse.Namespace, ratio: float) -> Dict[str, Any]:
    steps: Dict[str, Any] = dict(warmup_epochs=round(ratio * args.warmup_epochs))
    if args.sched == 'multistep':  # timm counts from 1 here
        steps['decay_milestones'] = [round(ratio * (epoch - 1)) + 1 for epoch in args.decay_milestones]
    elif args.sched == 'step':
        steps['decay_epochs'] = ratio * args.decay_epochs
    return steps


def _classifier_parameters(args: argparse.Namespace, num_classes: int) -> int:
    with torch.device('meta'):
        model = build_model(args.model, args.model_kwargs, num_classes=args.num_classes or num_classes,
                            in_chans=input_spec(args).channels)
    return sum(p.numel() for p in model.parameters())


def _classifier_classes(args: argparse.Namespace) -> Optional[int]:
    return open_splits(split_spec(args), input_spec(args).channels or 3).num_classes


def _detector_parser() -> OptionParser:
    import_extra('lightning', 'detection')  # says what is missing before there are runs
    return options.train_parser()


def _detector_length(args: argparse.Namespace) -> int:
    return options.schedule(args, args.batch_size * args.accumulate).iterations


def _detector_steps(args: argparse.Namespace, ratio: float) -> Dict[str, Any]:
    return dict(
        warmup_iterations=round(ratio * args.warmup_iterations),
        milestones=[round(ratio * iteration) for iteration in args.milestones],
    )


def _detector_parameters(args: argparse.Namespace, num_classes: int) -> int:
    with torch.device('meta'), blame(f'--backbone {args.backbone}', LookupError, RuntimeError, TypeError, ValueError):
        model = fasterrcnn(num_classes=num_classes + 1, **options.detector_arguments(args))
    return sum(p.numel() for p in model.parameters())


def _detector_classes(args: argparse.Namespace) -> int:
    return len(options.read_data(args, 'train').names)


TASKS = {
    'classification': Task(
        command=('train',),
        parser=train_parser,
        network='model',
        unit='epoch',
        first_row=0,
        measure='top-1 error',
        metrics=(Metric('error', 'Top-1 error', 'eval_top1', -1, 100, lower_is_better=True),),
        length=_classifier_length,
        scaled_steps=_classifier_steps,
        parameters=_classifier_parameters,
        classes=_classifier_classes,
    ),
    'detection': Task(
        command=('detect', 'train'),
        parser=_detector_parser,
        network='backbone',
        unit='iteration',
        first_row=1,
        measure='mAP',
        metrics=(Metric('map', 'mAP@[.5,.95]', 'eval_map', 100), Metric('map_50', 'mAP@.5', 'eval_map_50', 100)),
        length=_detector_length,
        scaled_steps=_detector_steps,
        parameters=_detector_parameters,
        classes=_detector_classes,
    ),
}


@dataclass(frozen=True)
class Data:
    """A data set that tables name."""
    recipe: str
    num_classes: int
    task: str = 'classification'  # a key of `TASKS`


DATASETS = {
    'cifar10': Data('cifar10', 10),
    'cifar100': Data('cifar100', 100),
    'imagenet': Data('imagenet_paper', 1000),
    'coco2014': Data('coco_frcnn_c4_paper', 80, 'detection'),
    'coco2017': Data('coco_frcnn_fpn_1x', 80, 'detection'),
    'bccd': Data('bccd_frcnn_fpn_cpu', 3, 'detection'),
}
