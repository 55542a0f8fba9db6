"""What is read, what is left out, and which class is which."""
import json
import logging
import os
import shutil

import pytest
import torch
from PIL import Image

import timm_rla_cli as cli
from timm_rla.common.datasets import (
    DataSource,
    class_indices,
    describe_dataset,
    image_mode,
    label_names,
    open_dataset,
)
from timm_rla.common.errors import UserError
from timm_rla.common.images import find_images
from timm_rla.train.data import SplitSpec, open_splits

ENDINGS = ('.png', '.jpg', '.webp', '.bmp', '.tif', '.TIFF', '.gif', '.ppm')


@pytest.fixture
def photos(tmp_path):
    """Two splits of three classes, in files of all kinds."""
    root = tmp_path / 'photos'
    for split in ('train', 'valid'):
        for value, name in enumerate(('cat', 'dog', 'owl')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for ending in ENDINGS:
                Image.new('RGB', (8, 8), (80 * value, 100, 50)).save(folder / f'a{ending}')
    return root


def open_photos(root, split='validation', **kwargs):
    return open_dataset(DataSource(data_dir=str(root)), split, **kwargs)


def test_every_kind_of_image_is_read(photos):
    for split in ('train', 'validation'):  # `valid`, by a synonym
        dataset = open_photos(photos, split)
        assert len(dataset) == 3 * len(ENDINGS) and label_names(dataset) == ['cat', 'dog', 'owl']
        assert [dataset[i][1] for i in range(len(dataset))] == [0] * 8 + [1] * 8 + [2] * 8
        assert describe_dataset(dataset, split) == f'{split}: 24 images, 3 classes (cat, dog, owl)'


def test_what_is_left_out_is_said(photos):
    (photos / 'train' / 'cat' / 'notes.txt').write_text('')
    (photos / 'train' / 'dog' / 'b.heic').write_text('')
    (photos / 'train' / 'dog' / 'c.heic').write_text('')
    (photos / 'train' / '.DS_Store').write_text('')
    (photos / 'train' / 'fox').mkdir()
    text = describe_dataset(open_photos(photos, 'train'), 'train')
    assert text == ('train: 24 images, 3 classes (cat, dog, owl); left out as no images: 2 .heic, 1 .txt; folders '
                    'without images: fox')


def test_hidden_folders_are_no_classes(photos):
    for folder in ('.ipynb_checkpoints', 'cat/.ipynb_checkpoints', '.Trash/eagle'):
        (photos / 'train' / folder).mkdir(parents=True)
        shutil.copy(photos / 'train' / 'cat' / 'a.png', photos / 'train' / folder)
    (photos / 'train' / 'cat' / '._a.png').write_bytes(b'no image')  # beside each file that comes from a Mac
    dataset = open_photos(photos, 'train')
    assert class_indices(dataset) == dict(cat=0, dog=1, owl=2)
    assert [dataset[i][1] for i in range(len(dataset))] == [0] * 8 + [1] * 8 + [2] * 8
    assert describe_dataset(dataset, 'train') == (
        'train: 24 images, 3 classes (cat, dog, owl); hidden folders left out: .Trash, '
        '.ipynb_checkpoints, cat/.ipynb_checkpoints; hidden images left out: 1')
    assert find_images([str(photos / 'train' / 'cat')])[0] == find_images([str(photos / 'train' / 'cat')], True)[0]
    assert len(find_images([str(photos / 'train')], recursive=True)[0]) == 24
    assert len(open_photos(photos, 'train', names=['owl', 'dog', 'cat'])) == 24
    shutil.move(photos / 'train', photos / '.hidden' / 'train')
    assert len(open_photos(photos / '.hidden', 'train')) == 24  # what the user names is not hidden


def test_linked_folders(photos, monkeypatch):
    """Each image comes once, also where a link leads back; a folder that cannot be read is said."""
    (photos / 'train' / 'linked').symlink_to(photos / 'valid' / 'owl')
    (photos / 'train' / 'back').symlink_to(photos / 'train')
    found, problems = find_images([str(photos / 'train')], recursive=True)
    assert len(found) == 32 and not problems
    scandir = os.scandir

    def denied(path):
        if str(path).endswith('cat'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', denied)
    found, problems = find_images([str(photos / 'train')], recursive=True)
    assert len(found) == 24 and problems == [f'{photos / "train" / "cat"}: Permission denied']


def test_folders_of_one_name_are_said(photos):
    for split in ('train', 'valid'):
        shutil.copytree(photos / split / 'cat', photos / split / 'more' / 'cat')
    text = describe_dataset(open_photos(photos, 'train'), 'train')
    assert text == ('train: 32 images, 3 classes (cat, dog, owl); folders that are one class, by their name: '
                    'cat and more/cat')


@pytest.mark.parametrize('name, words', [
    ('cifar10', 'cifar10: no type of dataset.*types are torch/, hfds/.*; torch/cifar10?'), ('troch/cifar10', 'torch/')])
def test_dataset_without_a_type(photos, name, words):
    with pytest.raises(UserError, match=f'--dataset {words}' if name in words else words):
        open_dataset(DataSource(str(photos), name), 'validation')


def test_classes_go_by_their_names(photos):
    shutil.rmtree(photos / 'valid' / 'cat')
    dataset = open_photos(photos, names=['cat', 'dog', 'owl'], num_classes=3)
    assert [dataset[i][1] for i in range(len(dataset))] == [1] * 8 + [2] * 8
    with pytest.raises(UserError, match=r"class 'dog' is none of those .* \(cat, owl\); a --class-map"):
        open_photos(photos, names=['cat', 'owl'])
    (photos / 'map.txt').write_text('owl\ndog\n')
    mapped = open_dataset(DataSource(str(photos), class_map=str(photos / 'map.txt')), 'validation', names=['a', 'b'])
    assert [mapped[i][1] for i in range(len(mapped))] == [1] * 8 + [0] * 8
    (photos / 'map.txt').write_text('owl\n')
    mapped = open_dataset(DataSource(str(photos), class_map=str(photos / 'map.txt')), 'validation')
    assert 'left out as of no class of the network or class map: 8' in describe_dataset(mapped, 'x')


def test_splits_are_never_classes(photos):
    (photos / 'valid').rename(photos / 'test')
    with pytest.raises(UserError, match='holds test, train, where .* valid .* is expected; --split test takes that'):
        open_photos(photos)
    with pytest.raises(UserError, match='; --val-split test takes that one'):
        open_photos(photos, split_option='--val-split')
    assert len(open_photos(photos, 'test')) == 24
    assert len(open_photos(photos / 'test')) == 24  # the folder of a split itself
    (photos / 'test' / 'cat').rename(photos / 'test' / 'train')  # trains may be what it is about
    assert label_names(open_photos(photos / 'test')) == ['dog', 'owl', 'train']


def test_the_hint_names_the_option_of_the_split(photos):
    with pytest.raises(UserError, match='a folder learn is expected; --train-split train takes that one'):
        open_splits(SplitSpec(DataSource(str(photos)), 4, train_split='learn'), 3)
    (photos / 'valid').rename(photos / 'test')
    with pytest.raises(UserError, match='; --train-split train takes that one'):
        open_splits(SplitSpec(DataSource(str(photos)), 4, train_split='learn'), 3)
    with pytest.raises(UserError, match='; --val-split test takes that one'):
        open_splits(SplitSpec(DataSource(str(photos)), 4), 3)


def test_a_number_of_samples_is_for_streams(photos):
    dataset = open_photos(photos, num_samples=5)
    assert len(dataset) == 24
    assert describe_dataset(dataset, 'validation', 5).endswith(
        '; all are read, a number of samples (5) is for streams alone')
    assert 'samples' not in describe_dataset(dataset, 'validation')


def test_images_outside_of_classes(photos):
    shutil.copy(photos / 'train' / 'cat' / 'a.png', photos / 'train')
    with pytest.raises(UserError, match='images outside of the folders of classes, in .*train'):
        open_photos(photos, 'train')


def test_too_many_classes_names_who_counted(photos):
    with pytest.raises(UserError, match='^classes of the network: 2: the dataset has 3 classes'):
        open_photos(photos, num_classes=2, counted_by='classes of the network:')


def test_channels(photos):
    assert [image_mode(n) for n in (1, 2, 3, 4)] == ['L', 'LA', 'RGB', 'RGBA']
    with pytest.raises(UserError, match='--in-chans 5'):
        image_mode(5)
    assert image_mode(3, 'HSV') == 'HSV'
    for mode, words in (('L', 'has 1 channel, the network takes 3'), ('XYZ', 'no mode of Pillow')):
        with pytest.raises(UserError, match=f'--input-img-mode {mode}: {words}'):
            image_mode(3, mode)


COMMON = ['--device', 'cpu', '--workers', '0']
TRAIN = ['train', *COMMON, '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--img-size', '8',
         '--batch-size', '12', '--epochs', '1', '--experiment', 'run']


@pytest.fixture
def trained(photos, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert cli.main([*TRAIN, '--data-dir', str(photos)]) == 0
    assert '--num-classes is not given: 3, those of the data' in caplog.text
    assert 'train: 24 images, 3 classes (cat, dog, owl)' in caplog.text
    return tmp_path / 'output' / 'train' / 'run' / 'last.pth.tar'


def test_names_stay_with_the_weights(trained, photos, tmp_path, capsys, caplog):
    args = torch.load(trained, weights_only=False)['args']
    assert args.num_classes == 3 and args.label_names == ['cat', 'dog', 'owl']
    picture = ['gradcam', str(photos / 'valid' / 'owl' / 'a.png'), '--device', 'cpu', '--class', 'owl']
    assert cli.main([*picture, '--checkpoint', str(trained)]) == 0  # without the folder
    assert 'a.png: owl, ' in capsys.readouterr().out

    assert cli.main(['export', str(trained), 'export']) == 0
    assert json.loads((tmp_path / 'export' / 'config.json').read_text())['label_names'] == ['cat', 'dog', 'owl']
    assert 'Classes:** 3 (cat, dog, owl)' in (tmp_path / 'export' / 'README.md').read_text()
    caplog.clear()
    assert cli.main([*picture, '--model', f'local-dir:{tmp_path / "export"}']) == 0  # with its weights
    assert 'a.png: owl, ' in capsys.readouterr().out and 'random weights' not in caplog.text
    assert cli.main([*picture[:4], '--model', 'rla_resnet20_cifar']) == 0
    assert 'rla_resnet20_cifar: random weights' in caplog.text


def test_a_missing_class_shifts_nothing(trained, photos, capsys):
    """Each image alone in a folder of its class, which is then the only class there."""
    validate = ['validate', *COMMON, '--checkpoint', str(trained), '--data-dir']
    assert cli.main([*validate, str(photos)]) == 0
    whole = json.loads(capsys.readouterr().out.split('--result')[1])['top1']
    parts = []
    for name in ('cat', 'dog', 'owl'):
        alone = photos / 'alone' / name
        shutil.copytree(photos / 'valid' / name, alone / name)
        assert cli.main([*validate, str(alone)]) == 0
        parts.append(json.loads(capsys.readouterr().out.split('--result')[1])['top1'])
    assert sum(parts) / 3 == pytest.approx(whole, abs=1e-3)


def test_classes_of_another_network(trained, photos, capsys):
    (photos / 'valid' / 'owl').rename(photos / 'valid' / 'eagle')
    for command in ('validate', 'attention'):
        assert cli.main([command, *COMMON, '--checkpoint', str(trained), '--data-dir', str(photos)]) == 2
        assert "class 'eagle' is none of those" in capsys.readouterr().err


def test_a_split_that_timm_would_not_find(photos):
    """It knows synonyms of train and validation alone, and would take all splits for classes."""
    (photos / 'valid').rename(photos / 'testing')
    assert len(open_photos(photos, 'testing')) == 3 * len(ENDINGS)
    with pytest.raises(UserError, match='holds testing, train, where a folder test is expected'):
        open_photos(photos, 'test')
    with pytest.raises(UserError, match='where a folder test is expected'):
        open_photos(photos, 'test', split_option='--val-split')


@pytest.mark.parametrize('dataset', ['', 'torch/image_folder'])
def test_classes_go_by_name_in_every_data_set(photos, dataset):
    """Where the network's order is another one than that of the folders, and where one of its classes is missing."""
    source = DataSource(str(photos), dataset)
    opened = open_dataset(source, 'train', names=['owl', 'fox', 'cat', 'dog'])
    assert class_indices(opened) == dict(cat=2, dog=3, owl=0)
    each = len(opened) // 3  # torchvision does not read GIF
    assert each >= 7
    loaded = torch.utils.data.DataLoader(opened, 24, num_workers=1, collate_fn=lambda batch: [y for _, y in batch])
    assert next(iter(loaded)) == [2] * each + [3] * each + [0] * each
    (photos / 'val').mkdir()
    for name in ('cat', 'owl'):
        shutil.copytree(photos / 'valid' / name, photos / 'val' / name)
    shutil.rmtree(photos / 'valid')
    with pytest.raises(UserError, match="classes of the splits differ, first in 'dog'"):
        open_splits(SplitSpec(source, 4, val_split='val'), 3)


@pytest.mark.parametrize('in_memory', [[], ['--in-memory', '--no-aug', '--workers', '0']], ids=str)
@pytest.mark.parametrize('channels', [1, 3])
def test_data_sets_of_torchvision(tmp_path, capsys, channels, in_memory):
    """Read as folders are: images have the channels of the network, and one that is damaged is named."""
    for split in ('train', 'validation'):
        for label in 'ab':
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(8):
                image = Image.new('L' if channels == 3 else 'RGB', (32, 32), index)
                image.save(tmp_path / split / label / f'{index}.png')
    command = ['train', '--device', 'cpu', '--model', 'resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)',
               '--in-chans', str(channels), '--batch-size', '8', '--epochs', '1', '--warmup-epochs', '0', '--lr',
               '0.05', '--dataset', 'torch/image_folder', '--data-dir', str(tmp_path), '--workers', '1', *in_memory]
    assert cli.main([*command, '--output', str(tmp_path / 'out'), '--experiment', 'a']) == 0
    damaged = tmp_path / 'train' / 'b' / '3.png'
    damaged.write_bytes(damaged.read_bytes()[:60])
    capsys.readouterr()
    assert cli.main([*command, '--output', str(tmp_path / 'out'), '--experiment', 'b']) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'error: cannot read image 11 of --dataset torch/image_folder:' in line
