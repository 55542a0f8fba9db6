"""Fixtures of the tests of detectors: generated images, and a run on them."""
import json

import pytest
import torch
from PIL import Image, ImageDraw
from small_detectors import COLORS, TRAIN

import timm_rla_cli as cli


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Coloured boxes on grey, in both orientations; categories with gaps; an image without objects."""
    root = tmp_path_factory.mktemp('shapes')
    (root / 'annotations').mkdir(), (root / 'images').mkdir()
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for i in range(8):
        width, height = (96, 64) if i % 2 else (64, 96)
        image = Image.new('RGB', (width, height), 'grey')
        for side, category in enumerate(COLORS if i else ()):
            w, h = [int(torch.randint(14, 26, (), generator=generator)) for _ in range(2)]
            x = side * width // 2 + int(torch.randint(width // 2 - w, (), generator=generator))
            y = int(torch.randint(height - h, (), generator=generator))
            ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLORS[category])
            annotations.append(dict(id=len(annotations) + 1, image_id=i + 10, category_id=category,
                                    bbox=[x, y, w, h], area=w * h, iscrowd=0))
        image.save(root / 'images' / f'{i}.png')
        images.append(dict(id=i + 10, file_name=f'{i}.png', width=width, height=height))
    content = dict(images=images, annotations=annotations,
                   categories=[dict(id=number, name=name) for number, name in COLORS.items()])
    for split in 'train', 'val':
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='session')
def run(data, tmp_path_factory):
    """Folder of a whole run."""
    output = tmp_path_factory.mktemp('runs')
    assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(output), '--experiment', 'whole']) == 0
    return output / 'whole'
