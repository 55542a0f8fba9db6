"""Samples that cannot be read, in WebDataset shards and Hugging Face datasets, are errors that name them."""
import argparse
import io
import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_rla_cli as cli
from timm_rla.common.datasets import DataSource, open_dataset

IMAGES = 12


def picture(index, whole=True):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8), (20 * index, 0, 0)).save(buffer, 'png')
    return buffer.getvalue() if whole else buffer.getvalue()[:50]


def write_shards(root, broken):
    for split in ('train', 'validation'):
        for shard in range(2):
            with tarfile.open(root / f'{split}-{shard}.tar', 'w') as archive:
                for index in range(IMAGES):
                    damaged = broken == 'sample' and (split, shard, index) == ('train', 1, 5)
                    for ending, content in (('jpg', picture(index, not damaged)), ('cls', str(index % 2).encode())):
                        info = tarfile.TarInfo(f'{split}{shard}{index:03}.{ending}')
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    if broken == 'shard':
        path = root / 'train-1.tar'
        path.write_bytes(path.read_bytes()[:3000])
    splits = {split: dict(filenames=[f'{split}-{shard}.tar' for shard in range(2)], name=split,
                          num_samples=2 * IMAGES, shard_lengths=[IMAGES] * 2) for split in ('train', 'validation')}
    (root / '_info.json').write_text(json.dumps(dict(splits=splits)))


TRAIN = ['train', '--model', 'rla_resnet20_cifar', '--num-classes', '2', '--img-size', '8', '--batch-size', '4',
         '--epochs', '1', '--device', 'cpu', '--input-size', '3', '8', '8', '--warmup-epochs', '0']


@pytest.mark.parametrize('broken, words', [
    ('', []), ('sample', ['train1005', 'train-1.tar']), ('shard', ['train-1.tar']),
])
@pytest.mark.parametrize('workers', ['0', '2'])
def test_webdataset(tmp_path, capsys, broken, words, workers):
    pytest.importorskip('webdataset', reason='needs pip install webdataset')
    write_shards(tmp_path, broken)
    code = cli.main([*TRAIN, '--dataset', 'wds/', '--data-dir', str(tmp_path), '--workers', workers, '--output',
                     str(tmp_path / 'out')])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == (2 if broken else 0), error
    assert all(word in error for word in words) and (not broken or 'cannot read image' in error), error


@pytest.mark.parametrize('workers', ['0', '1'])
def test_what_a_shuffled_stream_cannot_promise_is_said(tmp_path, caplog, workers):
    pytest.importorskip('webdataset', reason='needs pip install webdataset')
    write_shards(tmp_path, '')
    for epochs in ('1', '2'):
        assert 'shuffle in their workers' not in caplog.text
        assert cli.main([*TRAIN, '--dataset', 'wds/', '--data-dir', str(tmp_path), '--workers', workers, '--epochs',
                         epochs, '--output', str(tmp_path / 'out'), '--experiment', 'run', '--resume', 'auto']) == 0
    assert 'shuffle in their workers, anew from here on' in caplog.text


@pytest.mark.parametrize('workers', ['0', '1'])
def test_labels_that_are_no_classes(tmp_path, capsys, workers):
    """Nothing but the labels themselves says how many classes a stream has."""
    pytest.importorskip('webdataset', reason='needs pip install webdataset')
    write_shards(tmp_path, '')
    options = ['--dataset', 'wds/', '--data-dir', str(tmp_path), '--workers', workers, '--num-classes', '1']
    assert cli.main([*TRAIN, *options, '--output', str(tmp_path / 'out')]) == 2
    words = 'image of the stream: its label is 1, the network has classes 0 to 0'
    assert words in capsys.readouterr().err
    assert cli.main(['validate', '--model', 'rla_resnet20_cifar', '--input-size', '3', '8', '8', '--device', 'cpu',
                     *options]) == 2
    assert words in capsys.readouterr().err


def test_16_bits_in_a_webdataset(tmp_path, monkeypatch):
    pytest.importorskip('webdataset', reason='needs pip install webdataset')
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(buffer, 'png')
    monkeypatch.setitem(globals(), 'picture', lambda *args: buffer.getvalue())
    write_shards(tmp_path, '')
    image, _ = next(iter(open_dataset(DataSource(str(tmp_path), 'wds/'), 'validation')))
    assert image.mode == 'RGB' and image.getpixel((3, 3)) == (100, 100, 100)


def test_empty_split_of_a_stream(tmp_path, capsys):
    pytest.importorskip('webdataset', reason='needs pip install webdataset')
    write_shards(tmp_path, '')
    info = json.loads((tmp_path / '_info.json').read_text())
    info['splits']['validation'].update(num_samples=0, shard_lengths=[0, 0])
    (tmp_path / '_info.json').write_text(json.dumps(info))
    assert cli.main(['validate', '--model', 'rla_resnet20_cifar', '--input-size', '3', '8', '8', '--device', 'cpu',
                     '--dataset', 'wds/', '--data-dir', str(tmp_path)]) == 2
    assert '--split validation: holds no images' in capsys.readouterr().err


def test_freeze_on_a_stream(tmp_path, capsys):
    """Of a split that does not say how many images it has."""
    datasets = pytest.importorskip('datasets', reason='needs pip install datasets')
    write_parquet(datasets, tmp_path)
    torch.manual_seed(0)
    model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), num_classes=2)
    torch.save(dict(arch='rla_resnet20_cifar', state_dict=model.state_dict(), epoch=0, args=argparse.Namespace(
        model='rla_resnet20_cifar', model_kwargs=dict(layers=(1, 1, 1)), num_classes=2, input_size=(3, 8, 8))),
        tmp_path / 'last.pth.tar')
    command = ['freeze', str(tmp_path / 'last.pth.tar'), '--dataset', f'hfids/{tmp_path / "set"}', '--workers', '0',
               '--device', 'cpu', '--num-samples', str(IMAGES), '--val-num-samples', str(IMAGES)]
    assert cli.main(command) == 0
    assert 'Top-1 with attention' in capsys.readouterr().out and (tmp_path / 'frozen.pth.tar').is_file()


def write_parquet(datasets, root, broken=False):
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b'])))
    (root / 'set').mkdir()
    for split in ('train', 'validation'):
        rows = dict(
            image=[dict(bytes=picture(i, not (broken and split == 'train' and i == 5)), path=None)
                   for i in range(IMAGES)],
            label=[i % 2 for i in range(IMAGES)])
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / 'set' / f'{split}-0.parquet')


@pytest.mark.parametrize('streams', [False, True], ids=['tables', 'streams'])
@pytest.mark.parametrize('broken', [False, True], ids=['whole', 'broken'])  # older timm takes no capitals
def test_hugging_face(tmp_path, capsys, monkeypatch, streams, broken):
    datasets = pytest.importorskip('datasets', reason='needs pip install datasets')
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    write_parquet(datasets, tmp_path, broken)
    name = f'{"hfids" if streams else "hfds"}/{tmp_path / "set"}'
    code = cli.main([*TRAIN, '--dataset', name, '--workers', '0', '--output', str(tmp_path / 'out'), *(
        ['--train-num-samples', str(IMAGES), '--val-num-samples', str(IMAGES)] if streams else [])])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == (2 if broken else 0), error
    assert not broken or 'cannot read image' in error and (streams or '5 of the split' in error), error
