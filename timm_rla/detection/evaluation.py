"""The numbers of COCO, by torchmetrics on faster-coco-eval."""
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

__all__ = ['NUMBERS', 'CocoMetric', 'by_class_name', 'coco_results']

NUMBERS = {  # of torchmetrics, and what pycocotools prints
    'map': 'AP @[.5, .95]',
    'map_50': 'AP @.5',
    'map_75': 'AP @.75',
    'map_small': 'AP @[.5, .95], small',
    'map_medium': 'AP @[.5, .95], medium',
    'map_large': 'AP @[.5, .95], large',
    'mar_1': 'AR @[.5, .95], 1 detection',
    'mar_10': 'AR @[.5, .95], 10 detections',
    'mar_100': 'AR @[.5, .95], 100 detections',
    'mar_small': 'AR @[.5, .95], small',
    'mar_medium': 'AR @[.5, .95], medium',
    'mar_large': 'AR @[.5, .95], large',
}


class CocoMetric(MeanAveragePrecision):
    """torchmetrics' mean average precision with the settings of COCO, on boxes as its files have them."""

    def __init__(self) -> None:
        super().__init__(
            box_format='xywh',
            class_metrics=True,
            backend='faster_coco_eval',
            # those of pycocotools; the defaults are rounded to float32, which changes the third digit of small classes
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            sync_on_compute=False,  # it has the images of all processes
        )
        self.warn_on_many_detections = False  # the best 100 of an image count, as in COCO

    def add(self, detections: Sequence[Dict[str, torch.Tensor]], targets: Sequence[Dict[str, Any]]) -> None:
        """Count images.

        Args:
            detections: As a detector of torchvision returns them.
            targets: As `EvaluationImages` has them.
        """
        found = [dict(boxes=box_convert(d['boxes'].double(), 'xyxy', 'xywh'), scores=d['scores'].double(),
                      labels=d['labels']) for d in detections]
        keys = ('boxes', 'labels', 'iscrowd', 'area')
        self.update(found, [{key: target[key] for key in keys} for target in targets])

    def numbers(self) -> Dict[str, Any]:
        """The twelve numbers, -1 where there is no object to find, and `per_class`, AP @[.5, .95] by label."""
        values = self.compute()
        labels = values['classes'].reshape(-1).tolist()
        return {
            **{name: float(values[name]) for name in NUMBERS},
            'per_class': dict(zip(labels, values['map_per_class'].reshape(-1).tolist())),
        }


def by_class_name(numbers: Dict[str, Any], names: Sequence[str]) -> Dict[str, Any]:
    """The same numbers, `per_class` by name.

    Args:
        numbers: As from `CocoMetric.numbers`.
        names: Of labels 1 to K.
    """
    return dict(numbers, per_class={names[label - 1]: value for label, value in numbers['per_class'].items()})


def coco_results(
        detections: Sequence[Dict[str, torch.Tensor]],
        image_ids: Sequence[int],
        category_ids: Sequence[int],
) -> List[Dict[str, Any]]:
    """Detections as COCO's result files have them.

    Args:
        detections: Of each image, as a detector of torchvision returns them.
        image_ids: Of each image.
        category_ids: Of labels 1 to K.
    """
    return [
        dict(image_id=image, category_id=category_ids[label - 1], bbox=box, score=score)
        for found, image in zip(detections, image_ids)
        for box, label, score in zip(
            box_convert(found['boxes'].double(), 'xyxy', 'xywh').tolist(), found['labels'].tolist(),
            found['scores'].double().tolist())
    ]
