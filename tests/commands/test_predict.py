"""`timm-rla predict`: the same probabilities as the network itself, from every place that weights come from."""
import csv
import json
import os
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_rla_cli as cli
from timm_rla.common.options import parse
from timm_rla.train.options import train_parser
from timm_rla.train.run import train


@pytest.fixture(scope='module')
def trained(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('predict')
    return train(parse(train_parser(), [
        '--data-dir', str(image_folder), '--output', str(output), '--device', 'cpu', '--workers', '0', '--model',
        'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--img-size', '8', '--batch-size', '16', '--epochs',
        '1'])) / 'last.pth.tar'


@pytest.fixture
def predict(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv, source=('--checkpoint', trained), code=0):
        assert cli.main(['predict', *map(str, argv), *map(str, source), '--device', 'cpu']) == code
        return capsys.readouterr()

    return run


def expected(trained, paths):
    model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), num_classes=10).eval()
    model.load_state_dict(torch.load(trained, weights_only=False)['state_dict'])
    transform = create_transform(**resolve_data_config(dict(img_size=8), model=model))
    with torch.inference_mode():
        return [model(transform(Image.open(path).convert('RGB'))[None]).softmax(1)[0] for path in paths]


@pytest.mark.parametrize('workers, batch_size', [(0, 64), (2, 7)])
def test_probabilities(predict, trained, image_folder, tmp_path, workers, batch_size):
    folder = image_folder / 'validation'
    out = predict(folder, '--json', '--topk', '3', '--csv', 'p.csv', '-j', workers, '-b', batch_size).out
    rows = json.loads(out)
    paths = sorted(folder.rglob('*.png'))
    assert [row['image'] for row in rows] == [str(path) for path in paths] and len(rows) == 30
    for row, probabilities in zip(rows, expected(trained, paths)):
        values, indices = probabilities.topk(3)
        assert [entry['index'] for entry in row['predictions']] == indices.tolist()
        assert [entry['name'] for entry in row['predictions']] == [str(index) for index in indices.tolist()]
        assert [entry['probability'] for entry in row['predictions']] == pytest.approx(values.tolist(), abs=2e-6)
    with open(tmp_path / 'p.csv', newline='') as f:
        table = list(csv.DictReader(f))
    assert len(table) == 90 and [line['rank'] for line in table[:3]] == ['1', '2', '3']
    assert float(table[5]['probability']) == rows[1]['predictions'][2]['probability']


def test_from_an_exported_folder(predict, trained, image_folder, tmp_path):
    image = next((image_folder / 'validation' / '7').iterdir())
    text = predict(image).out
    assert text.startswith(str(image)) and text.count('%') == 5
    assert cli.main(['export', str(trained), 'exported']) == 0
    assert predict(image, source=('--model', 'local-dir:exported')).out.splitlines()[-1] == text.strip()
    assert 'local-dir:exported' in predict(image, source=('--checkpoint', 'exported'), code=2).err


def test_other_images_are_done_where_one_cannot_be_read(predict, image_folder, tmp_path):
    image = next((image_folder / 'validation' / '7').iterdir())
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    captured = predict('bad.jpg', image, 'missing.png', code=2)
    assert str(image) in captured.out
    assert 'bad.jpg' in captured.err and 'missing.png: No such file' in captured.err


@pytest.mark.parametrize('options, words', [
    (['--topk', '0'], '--topk 0'),
    (['--csv', '.'], 'is a folder'),
    (['--tokp', '3'], 'did you mean --topk'),
    (['--model-kwargs', 'layers=(1,0,0)'], 'division by zero'),
    (['--use-ema'], 'last.pth.tar holds no EMA weights'),
    (['--crop-border-pixels', '4'], '--crop-border-pixels 4: leaves nothing of an image of 8 x 8'),
    (['--mean', '0', '0'], '--mean 0.0 0.0: 2 numbers for 3 channels'),
], ids=str)
def test_bad_input(predict, image_folder, options, words):
    assert words in predict(image_folder, *options, code=2).err


@pytest.mark.parametrize('name', ['a.png', 'link.png', 'w.pth.tar'])
def test_inputs_stay(predict, trained, image_folder, tmp_path, name):
    shutil.copy(next((image_folder / 'validation' / '7').iterdir()), tmp_path / 'a.png')
    shutil.copy(trained, tmp_path / 'w.pth.tar')
    (tmp_path / 'link.png').symlink_to('a.png')
    before = (tmp_path / name).read_bytes()
    assert 'is what the command reads' in predict(
        'a.png', '--csv', name, source=('--checkpoint', 'w.pth.tar'), code=2).err
    assert (tmp_path / name).read_bytes() == before and (tmp_path / 'link.png').is_symlink()


@pytest.mark.skipif(sys.platform != 'linux', reason='names are any bytes on Linux')
def test_names_of_all_kinds(predict, image_folder, tmp_path):
    image, folder = next((image_folder / 'validation' / '7').iterdir()), tmp_path / 'odd'
    folder.mkdir()
    for name in ('a\nb.png', '\x1b[31mred.png', os.fsdecode(b'latin\xe9.png')):
        shutil.copy(image, folder / name)
    (folder / 'bad\nline.png').write_bytes(b'no image')
    os.mkfifo(folder / 'pipe.png')
    captured = predict('odd', 'odd/pipe.png', '--csv', 'p.csv', '--topk', '1', code=2)
    names = [line.split()[0] for line in captured.out.splitlines()]
    assert names == [r'odd/\x1b[31mred.png', r'odd/a\nb.png', r'odd/latin\udce9.png']
    error = captured.err.splitlines()[-1]
    assert r'error: cannot read image odd/bad\nline.png: ' in error and 'odd/pipe.png: no plain file' in error
    with open('p.csv', newline='', encoding='utf-8') as f:
        assert [row['image'] for row in csv.DictReader(f)][1:] == ['odd/a\nb.png', r'odd/latin\udce9.png']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize('buffering', [1, -1])
def test_output_on_a_full_disk(trained, image_folder, capsys, monkeypatch, buffering):
    argv = ['predict', str(image_folder / 'validation' / '7'), '--checkpoint', str(trained), '--device', 'cpu']
    with open('/dev/full', 'w', buffering) as full:
        monkeypatch.setattr(sys, 'stdout', full)
        assert cli.main(argv) == 2
    assert 'error: the output cannot be written: No space left' in capsys.readouterr().err.splitlines()[-1]


def test_folders_are_no_checkpoints(predict, trained, image_folder):
    line = predict(image_folder, source=('--checkpoint', trained.parent), code=2).err
    assert f'is a folder; did you mean {trained}?' in line
    line = predict(image_folder, source=('--checkpoint', trained.parent / 'args.yaml'), code=2).err
    assert 'no checkpoint, damaged, or with code in it' in line and 'weights_only' not in line
