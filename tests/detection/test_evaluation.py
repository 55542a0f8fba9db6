"""The twelve numbers beside those of pycocotools, on boxes of all sizes, crowds, boxes without area, empty images."""
import pytest
import torch

pytest.importorskip('faster_coco_eval')
coco = pytest.importorskip('pycocotools.coco')


def objects(generator, count, size=300):
    xy = torch.rand(count, 2, generator=generator, dtype=torch.float64) * size
    wh = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 2 * 200 + 2
    return torch.cat([xy, wh], 1).float().double()  # what files of COCO hold is shorter, too


@pytest.mark.parametrize('seed', range(5))
def test_numbers(seed):
    from pycocotools.cocoeval import COCOeval

    from timm_rla.detection.evaluation import NUMBERS, CocoMetric, coco_results
    generator = torch.Generator().manual_seed(seed)
    metric, images, annotations, results, categories = CocoMetric(), [], [], [], [5, 9, 70]
    for i in range(20):
        count = int(torch.randint(0, 9, (), generator=generator))
        boxes = objects(generator, count)
        boxes[:1, 2] *= i % 4 > 0  # without area
        labels = torch.randint(1, 4, (count,), generator=generator)
        crowd = torch.rand(count, generator=generator) < 0.2
        area = boxes[:, 2:].prod(1) * 0.7  # that of the object, not of the box
        images.append(dict(id=100 + i, width=600, height=600, file_name=f'{i}.png'))
        for box, label, group, size in zip(boxes.tolist(), labels.tolist(), crowd.tolist(), area.tolist()):
            annotations.append(dict(id=len(annotations) + 1, image_id=100 + i, category_id=categories[label - 1],
                                    bbox=box, iscrowd=int(group), area=size))
        near = boxes.repeat(2, 1) + torch.randn(2 * count, 4, generator=generator, dtype=torch.float64) * 4
        found = torch.cat([near, objects(generator, 4)])
        found[:, 2:].clamp_(min=1)
        corners = torch.cat([found[:, :2], found[:, :2] + found[:, 2:]], 1).float()
        detections = dict(boxes=corners, scores=torch.rand(len(found), generator=generator),
                          labels=torch.cat([labels.repeat(2), torch.randint(1, 4, (4,), generator=generator)]))
        metric.add([detections], [dict(boxes=boxes, labels=labels, iscrowd=crowd.long(), area=area)])
        results += coco_results([detections], [100 + i], categories)

    truth = coco.COCO()
    truth.dataset = dict(info={}, images=images, annotations=annotations,
                         categories=[dict(id=number, name=str(number)) for number in categories])
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    numbers = metric.numbers()
    assert [numbers[name] for name in NUMBERS] == torch.tensor(evaluation.stats, dtype=torch.float32).tolist()
    assert 0.05 < numbers['map'] < 0.9 and all(numbers[name] >= 0 for name in NUMBERS)
    for label in 1, 2, 3:
        precision = evaluation.eval['precision'][:, :, label - 1, 0, 2]
        assert numbers['per_class'][label] == pytest.approx(precision[precision > -1].mean(), abs=1e-6)
