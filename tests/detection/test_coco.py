"""Files of annotations: what is read, and what is refused in one line."""
import copy
import json

import pytest
import torch
from PIL import Image

from timm_rla.common.errors import UserError
from timm_rla.detection.coco import describe_split, find_layout, read_split, training_boxes

GOOD = dict(
    images=[dict(id=7, file_name='a.png', width=40, height=30), dict(id=3, file_name='b.png', width=30, height=40)],
    annotations=[
        dict(id=1, image_id=7, category_id=90, bbox=[1, 2, 10, 12], area=100, iscrowd=0),
        dict(id=2, image_id=7, category_id=4, bbox=[35, 2, 10, 12], iscrowd=0),
        dict(id=5, image_id=7, category_id=4, bbox=[3, 3, 0, 12], area=0, iscrowd=0),
        dict(id=9, image_id=7, category_id=4, bbox=[0, 0, 20, 20], area=400, iscrowd=1),
        dict(id=11, image_id=7, category_id=4, bbox=[50, 50, 20, 20], area=400),
    ],
    categories=[dict(id=90, name='dog'), dict(id=4, name='cat')],
)


@pytest.fixture
def folder(tmp_path):
    for name, size in (('a.png', (40, 30)), ('b.png', (30, 40))):
        Image.new('RGB', size, 'red').save(tmp_path / name)
    return tmp_path


def read(folder, content, **kwargs):
    path = folder / 'annotations.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_split(path, folder, '--val-annotations', **kwargs)


def test_what_is_read(folder):
    split = read(folder, GOOD)
    assert split.names == ['cat', 'dog'] and split.category_ids == [4, 90]  # ids with a gap
    first, second = split.images
    assert first.labels.tolist() == [2, 1, 1, 1, 1] and first.area.tolist() == [100, 120, 0, 400, 400]
    assert first.crowd.tolist() == [False, False, False, True, False]
    assert len(second.boxes) == 0 and second.boxes.shape == (0, 4)
    boxes, labels = training_boxes(first)  # clipped; without crowd, empty and outside ones
    assert boxes.tolist() == [[1, 2, 11, 14], [35, 2, 40, 14]] and labels.tolist() == [2, 1]
    assert boxes.dtype == torch.float32
    assert describe_split('val', split) == 'val: 2 images, 5 objects of 2 classes (cat, dog), 1 images without objects'


def changed(path, value):
    content = copy.deepcopy(GOOD)
    *parents, last = path
    entry = content
    for key in parents:
        entry = entry[key]
    entry[last] = value
    return content


@pytest.mark.parametrize('content, message', [
    ('{', 'annotations.json'),
    ('[]', "no list 'images'"),
    ('[' * 100_000, 'annotations.json'),
    (dict(GOOD, categories=None), "no list 'categories'"),
    (dict(GOOD, images=[3]), "no list 'images'"),
    (dict(GOOD, categories=[]), 'no categories'),
    (changed(['images', 1, 'id'], 7), 'image id 7 occurs 2 times'),
    (changed(['images', 1, 'id'], '7'), "id '7'"),
    (changed(['images', 1, 'width'], 0), 'width 0'),
    (changed(['images', 1, 'file_name'], None), 'file name None'),
    (changed(['images', 1, 'file_name'], 'x' * 5000), "file name 'xxx"),
    (changed(['images', 1, 'file_name'], '/etc/passwd'), "file name '/etc/passwd', outside of the folder"),
    (changed(['images', 1, 'file_name'], '../a.png'), "file name '../a.png', outside of the folder"),
    (changed(['images', 1, 'file_name'], 'c.png'), '1 of 2 images are missing.*c.png.*--skip-missing'),
    (changed(['categories', 1, 'id'], 90), 'category id 90 occurs 2 times'),
    (changed(['categories', 1, 'name'], 5), 'name 5'),
    (changed(['annotations', 1, 'id'], 1), 'annotation id 1 occurs 2 times'),
    (changed(['annotations', 1, 'category_id'], 5), 'category 5'),
    (changed(['annotations', 1, 'image_id'], 5), 'image 5'),
    (changed(['annotations', 1, 'bbox'], [1, 2, 3]), r'box \[1, 2, 3\]'),
    (changed(['annotations', 1, 'bbox'], [1, 2, 3, 'a']), 'box'),
    (changed(['annotations', 1, 'bbox'], [1, 2, 3, float('nan')]), 'box'),
    (changed(['annotations', 1, 'bbox'], [1, 2, -3, 4]), r'box \[1, 2, -3, 4\].*not below 0'),
    (changed(['annotations', 1, 'bbox'], [1, 2, 10 ** 400, 4]), 'box'),
    (changed(['images', 1, 'height'], 10 ** 400), 'height 1'),
    (dict(GOOD, annotations=[]), 'no object in any of its 2 images'),
    (dict(GOOD, annotations=[dict(entry, iscrowd=1) for entry in GOOD['annotations']]), 'all 5 are crowds'),
    (dict(GOOD, annotations=[dict(entry, bbox=[1, 2, 0, 4]) for entry in GOOD['annotations']]), 'without area'),
])
def test_what_is_refused(folder, content, message):
    with pytest.raises(UserError, match=message):
        read(folder, content)


def test_an_area_that_cannot_be_is_that_of_the_box(folder):
    first, _ = read(folder, changed(['annotations', 0, 'area'], 10 ** 400)).images
    width, height = GOOD['annotations'][0]['bbox'][2:]
    assert first.area[0] == width * height


def test_missing_images_are_left_out_if_asked(folder):
    split = read(folder, changed(['images', 1, 'file_name'], 'c.png'), skip_missing=True)
    assert [entry.id for entry in split.images] == [7]


def test_layouts(tmp_path):
    with pytest.raises(UserError, match='coco2017: annotations/instances_SPLIT2017.json'):
        find_layout(tmp_path)
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'val2017').mkdir()
    (tmp_path / 'annotations' / 'instances_val2017.json').write_text('{}')
    assert find_layout(tmp_path) == 'coco2017'


def test_categories_of_the_same_name(folder, caplog):
    """As tools write them that name the category above all others, too: none hides the other's results."""
    split = read(folder, changed(['categories', 1, 'name'], 'dog'))
    assert split.names == ['dog (4)', 'dog (90)'] and split.category_ids == [4, 90]
    assert "same name get their ids behind it: ['dog']" in caplog.text
