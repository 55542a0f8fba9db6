"""The fast road: the same images as the ordinary one, cropped and flipped with the right frequencies, resumable."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import timm_rla_cli as cli
from timm_rla.common.device import Placement
from timm_rla.common.errors import UserError
from timm_rla.common.in_memory import CROPPING, SHUFFLING, InMemoryLoader, _available_memory, _check_memory, _generator
from timm_rla.common.options import parse
from timm_rla.train.data import create_loaders, open_splits
from timm_rla.train.options import data_spec, split_spec, train_parser
from timm_rla.train.run import train

CPU = Placement(torch.device('cpu'))
CONFIG = dict(input_size=(3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation='bilinear', crop_pct=1.)
OPTIONS = ['--device', 'cpu', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--num-classes',
           '10', '--img-size', '8', '--batch-size', '16', '--workers', '0', '--color-jitter', '0', '--train-crop-mode',
           'pad', '--lr', '0.05', '--warmup-epochs', '1', '--experiment', 'run']


def load(folder, *options, config=CONFIG):
    args = parse(train_parser(), [*OPTIONS, '--data-dir', str(folder), *options])
    splits = open_splits(split_spec(args), config['input_size'][0], 10)
    return create_loaders(splits, data_spec(args, 10, 'bilinear'), config, CPU)


def loader(count=64, size=4, pad=4, **kwargs):
    """Each pixel tells its image, row and column."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    images = torch.zeros(count, size + 2 * pad, size + 2 * pad, 3, dtype=torch.uint8)
    images[:, pad:pad + size, pad:pad + size] = torch.stack([torch.zeros_like(rows), rows + 1, columns + 1], 2)
    images[..., 0] = torch.arange(count)[:, None, None]
    options = dict(batch_size=8, placement=CPU, mean=(0.,) * 3, std=(1 / 255,) * 3, training=True, pad=pad, hflip=0.5)
    return InMemoryLoader(images, torch.arange(count), **dict(options, **kwargs))


@pytest.mark.parametrize('size, mode', [('8', 'center'), ('12', 'center'), ('12', 'squash'), ('12', 'border')])
def test_validation_images_are_those_of_the_ordinary_road(image_folder, size, mode):
    """Resized and cropped, too: pixel for pixel, up to the rounding of the normalisation."""
    config = dict(CONFIG, input_size=(3, int(size), int(size)), crop_pct=0.875, crop_mode=mode)
    roads = [load(image_folder, '--img-size', size, *extra, config=config) for extra in ([], ['--in-memory'])]
    for (images, targets), (expected, expected_targets) in zip(
            roads[1].eval_loader, roads[0].eval_loader, strict=True):
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(targets, expected_targets)


def test_training_images_are_those_of_the_ordinary_road(image_folder):
    """Without crop and flip each image of one road is one of the other, with its label."""
    roads = [load(image_folder, '--no-aug', *extra) for extra in ([], ['--in-memory'])]
    seen = []
    for road in roads:
        road.track({})
        road.start_epoch(0, mixes=True)
        seen.append(sorted((int(target), *image.flatten().mul(100).round().int().tolist())
                           for images, targets in road.train_loader for image, target in zip(images, targets)))
    assert len(seen[0]) == len(seen[1]) == 80 and seen[0] == seen[1]


@pytest.mark.parametrize('name', ['nearest', 'bicubic'])
def test_resizing_before_the_crop_is_as_asked_for(image_folder, name):
    """The window in the middle of each padded image is the image, resized by Pillow."""
    options = ['--img-size', '12', '--train-interpolation', name, '--hflip', '0']
    road = load(image_folder, *options, '--in-memory', config=dict(CONFIG, input_size=(3, 12, 12)))
    args = parse(train_parser(), [*OPTIONS, '--data-dir', str(image_folder), *options])
    how = dict(nearest=Image.Resampling.NEAREST, bicubic=Image.Resampling.BICUBIC)[name]
    images = open_splits(split_spec(args), 3, 10).train
    expected = [np.asarray(images[index][0].resize((12, 12), how)) for index in range(len(images))]
    assert np.array_equal(road.train_loader.images[:, 4:16, 4:16].numpy(), np.stack(expected))
    ordinary = load(image_folder, *options, config=dict(CONFIG, input_size=(3, 12, 12))).train_loader.dataset
    scaled, _ = ordinary.transform.transforms[0].transforms
    image = Image.open(ordinary.reader.samples[3][0]).convert('RGB')
    assert np.array_equal(np.asarray(scaled(image)), expected[3])


def test_random_numbers_of_crops_are_not_those_of_the_order():
    states = [_generator(*numbers).get_state().tolist() for numbers in
              [(42, 3, SHUFFLING), *((42, 3, CROPPING, rank) for rank in range(3)), (42, 4, SHUFFLING), (42, 3)]]
    assert all(a != b for i, a in enumerate(states) for b in states[:i])


OPEN_FILES = '''
import resource, sys, torch
from PIL import Image
from timm_rla.common.device import Placement
from timm_rla.common.in_memory import decode

class Images(torch.utils.data.Dataset):
    transform = None
    def __len__(self):
        return 1500
    def __getitem__(self, index):
        return self.transform(Image.new('RGB', (8, 8), (index % 256, 0, 0))), index

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
config = dict(input_size=(3, 8, 8), interpolation='bilinear', crop_pct=1.)
images, targets = decode(Images(), config, Placement(torch.device('cpu')), True, workers=2)
assert torch.equal(targets, torch.arange(1500)) and torch.equal(images[:, 3, 3, 0], targets.remainder(256).byte())
'''


def test_few_files_are_open_at_a_time():
    """Each tensor that a worker sends is one; systems allow 1,024 of them, and less."""
    pytest.importorskip('resource')
    subprocess.run([sys.executable, '-c', OPEN_FILES], check=True, timeout=120)


def test_every_image_once_in_an_epoch():
    batches = list(loader())
    targets = torch.cat([targets for _, targets in batches])
    assert len(batches) == 8 and sorted(targets.tolist()) == list(range(64)) and targets.tolist() != list(range(64))
    for images, targets in batches:
        assert torch.equal(images[:, 0, 0, 0].round().long(), targets)


def test_crops_and_flips_have_the_right_frequencies():
    """Chi-squared: the 81 windows are equally likely, and half of them are flipped; independently of each other."""
    source = loader(count=256, batch_size=256)
    counts = torch.zeros(2, 9, 9)
    for epoch in range(80):
        source.set_epoch(epoch)
        images, _ = next(iter(source))
        for image in images.round().int():
            ys, xs = torch.nonzero(image[1], as_tuple=True)
            if len(xs.unique()) < 2:
                continue  # with less than two columns of the image in sight a flip cannot be told
            y, x = int(ys[0]), int(xs[0])
            row, column = int(image[1, y, x]) - 1, int(image[2, y, x]) - 1
            flipped = int(image[2, y, x]) > int(image[2, y, xs.max()])
            counts[int(flipped), 4 + row - y, 4 + column - (3 - x if flipped else x)] += 1
    inside = counts[:, 2:7, 2:7]  # windows with two rows and columns or more of the image
    expected = inside.sum() / inside.numel()
    chi_squared = ((inside - expected) ** 2 / expected).sum()
    assert inside.sum() > 4000 and chi_squared < 49 + 4 * (2 * 49) ** 0.5


def test_epochs_differ_and_repeat():
    source = loader()
    epochs = []
    for epoch in (0, 1, 0):
        source.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in source]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    other = loader(seed=1)
    assert not torch.equal(torch.cat([images for images, _ in other]), epochs[0])


@pytest.mark.parametrize('training', [True, False])
def test_processes_share_the_images(training):
    targets = [
        torch.cat([targets for _, targets in loader(
            count=66, placement=Placement(torch.device('cpu'), distributed=True, world_size=3, rank=rank),
            training=training)]) for rank in range(3)]
    if training:
        assert [len(t) for t in targets] == [16, 16, 16]
        assert len(set(torch.cat(targets).tolist())) == 48
    else:
        assert [len(t) for t in targets] == [22, 22, 22]
        assert sorted(torch.cat(targets).tolist()) == list(range(66))


def test_more_processes_than_images():
    """Each has a batch to validate: the loss of none would not be a number."""
    places = [Placement(torch.device('cpu'), distributed=True, world_size=5, rank=rank) for rank in range(5)]
    assert [[t.tolist() for _, t in loader(count=2, placement=place, training=False)] for place in places] == [
        [[0]], [[1]], [[0]], [[1]], [[0]]]


def test_type_and_layout():
    place = Placement(torch.device('cpu'), torch.bfloat16, channels_last=True)
    images, _ = next(iter(loader(placement=place)))
    assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(loader()))[0].is_contiguous()


@pytest.mark.parametrize('options', [[], ['--mixup', '0.2', '--mixup-off-epoch', '2'], ['--model-ema']], ids=str)
def test_run_goes_on_bit_for_bit(image_folder, tmp_path, options):
    def run(output, epochs):
        command = [*OPTIONS, '--data-dir', str(image_folder), '--output', str(tmp_path / output), '--in-memory',
                   '--resume', 'auto', '--sched', 'step', '--epochs', str(epochs), *options]
        return torch.load(train(parse(train_parser(), command)) / 'last.pth.tar', weights_only=False)

    whole = run('whole', 4)
    run('parts', 2)
    parts = run('parts', 4)
    assert all(torch.equal(value, parts['state_dict'][key]) for key, value in whole['state_dict'].items())


@pytest.mark.parametrize('options, words', [
    (['--aa', 'rand-m6'], ['--aa', 'rand-m6']),
    (['--reprob', '0.3'], ['--reprob', '0.3']),
    (['--color-jitter', '0.4'], ['--color-jitter', '0.4']),
    (['--train-crop-mode', 'rrc'], ['--train-crop-mode pad', '--no-aug']),
    (['--batch-size', '100'], ['100', '80']),
    (['--no-aug', '--aug-repeats', '3'], ['--aug-repeats 3', 'to 0']),
], ids=str)
def test_what_it_cannot_do_is_refused(image_folder, tmp_path, capsys, options, words):
    command = ['train', *OPTIONS, '--data-dir', str(image_folder), '--output', str(tmp_path), '--in-memory', *options]
    assert cli.main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


def test_advice_can_be_followed(image_folder, tmp_path, capsys):
    command = ['train', *OPTIONS, '--data-dir', str(image_folder), '--output', str(tmp_path), '--in-memory']
    assert cli.main([*command, '--aa', 'rand-m6']) == 2
    assert "or set --aa to ''" in capsys.readouterr().err
    assert cli.main([*command, '--epochs', '1', '--warmup-epochs', '0', '--aa', '']) == 0


@pytest.mark.parametrize('option', [['--in-memory'], []], ids=str)
def test_images_of_unequal_size(tmp_path, capsys, option):
    for split in ('train', 'validation'):
        for label, size in (('a', 32), ('b', 40)):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(8):
                Image.fromarray(np.full((size, size, 3), index, np.uint8)).save(
                    tmp_path / split / label / f'{index}.png')
    command = ['train', '--device', 'cpu', '--model', 'resnet20_cifar', '--num-classes', '2', '--train-crop-mode',
               'pad', '--color-jitter', '0', '--workers', '0', '--batch-size', '16', '--epochs', '1', '--data-dir',
               str(tmp_path), '--output', str(tmp_path / 'out'), *option]
    assert cli.main(command) == 2
    assert 'image of 40 x 40 pixels' in capsys.readouterr().err
    assert cli.main([*command, '--img-size', '16', '--model-kwargs', 'layers=(1,1,1)']) == 0


def test_too_large_for_the_memory(image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('timm_rla.common.in_memory._available_memory', lambda device: 2 ** 10)
    command = ['train', *OPTIONS, '--data-dir', str(image_folder), '--output', str(tmp_path), '--in-memory']
    assert cli.main(command) == 2
    line = capsys.readouterr().err
    assert '80 images need' in line and 'MiB' in line and 'free on cpu' in line


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    """What each decodes is there for each; all come to the same verdict, by the one that sees least."""
    place = Placement(torch.device('cpu'), distributed=True, world_size=4)
    monkeypatch.setattr(Placement, 'gather', lambda self, items: [2 ** 30, 2 ** 29, 2 ** 30, 2 ** 30])
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')  # two machines
    _check_memory(2 ** 27, 100, place)
    with pytest.raises(UserError, match='need 256 MiB in each of 2 processes, of which 512 MiB are free on cpu'):
        _check_memory(2 ** 28, 100, place)


def test_copies_of_files_in_memory_do_not_count(monkeypatch, tmp_path):
    (tmp_path / 'meminfo').write_text('MemTotal:  16000000 kB\nMemFree:  1000 kB\nMemAvailable:  2000 kB\nHuge: 0\n')
    monkeypatch.setattr('timm_rla.common.in_memory.MEMINFO', str(tmp_path / 'meminfo'))
    assert _available_memory(torch.device('cpu')) == 2000 * 1024
    monkeypatch.setattr('timm_rla.common.in_memory.MEMINFO', str(tmp_path / 'nothing'))
    assert _available_memory(torch.device('cpu')) is None
