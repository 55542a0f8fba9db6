"""Training runs: what they write, and that one killed at any point goes on to the same end, bit for bit."""
import csv
import os
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from helpers import TINY_RUN, Killed, assert_same_run, load, train
from PIL import Image

import timm_rla_cli as cli
from timm_rla.common.device import Placement
from timm_rla.common.images import prepare_network
from timm_rla.common.networks import NetworkSpec, load_network
from timm_rla.common.options import parse
from timm_rla.common.stopping import Stopped
from timm_rla.common.summary import read_summary
from timm_rla.train import folder as run_folder
from timm_rla.train.checkpoints import Checkpoints
from timm_rla.train.data import create_loaders, open_splits
from timm_rla.train.epoch import Trainer
from timm_rla.train.folder import RunFolder
from timm_rla.train.options import data_spec, split_spec, train_parser

LOOKAHEAD = '' if timm.__version__ == '1.0.21' else 'lookahead_'  # there it fails with second derivatives
RECIPES = {
    'main process': ['--workers', '0', '--mixup', '0.2', '--mixup-off-epoch', '3', '--reprob', '0.3', '--model-ema',
                     '--model-ema-decay', '0.9'],
    'two workers': ['--workers', '2', '--mixup', '0.2', '--cutmix', '1.0', '--reprob', '0.3', '--checkpoint-hist', '2'],
    'plateau': ['--workers', '0', '--sched', 'plateau', '--patience-epochs', '0', '--warmup-epochs', '0',
                '--lr-noise', '0.1', '0.9'],
    'generator of the optimizer': ['--workers', '0', '--opt', f'{LOOKAHEAD}adahessian', '--lr', '0.001'],
    'no prefetcher': ['--workers', '2', '--no-prefetcher', '--mixup', '0.2', '--train-crop-mode', 'pad'],
}
EPOCHS = 5
KILLED_EPOCH = 3  # index of the epoch in which, or after which, the run is killed


def kill_in_epoch(monkeypatch):
    real = Trainer.train_epoch

    def train_epoch(self, loader, epoch, *args):
        metrics = real(self, loader, epoch, *args)
        if epoch == KILLED_EPOCH:
            raise Killed
        return metrics

    monkeypatch.setattr(Trainer, 'train_epoch', train_epoch)


def kill_before_summary(monkeypatch):
    real = run_folder.write_row

    def write_row(run_dir, row):
        if row['epoch'] == KILLED_EPOCH:
            raise Killed
        real(run_dir, row)

    monkeypatch.setattr(run_folder, 'write_row', write_row)


def kill_in_summary(monkeypatch):
    """As timm's script, which writes the row before the checkpoint, line by line."""
    real = Checkpoints.save

    def save(self, content, epoch, metric):
        if epoch == KILLED_EPOCH:
            run_folder.write_row(self.folder, content['summary'])
            path = self.folder / 'summary.csv'
            path.write_text(path.read_text()[:-20])
            raise Killed
        real(self, content, epoch, metric)

    monkeypatch.setattr(Checkpoints, 'save', save)


def kill_before_last(monkeypatch):
    real = Checkpoints.save

    def save(self, content, epoch, metric):
        if epoch == KILLED_EPOCH:
            raise Killed
        real(self, content, epoch, metric)

    monkeypatch.setattr(Checkpoints, 'save', save)


def kill_in_last(monkeypatch):
    """The new file is written, and has not taken its place yet."""
    real = os.replace

    def replace(src, dst):
        if str(dst).endswith('last.pth.tar') and (dst.parent / f'checkpoint-{KILLED_EPOCH - 1}.pth.tar').exists():
            raise Killed
        real(src, dst)

    monkeypatch.setattr(os, 'replace', replace)


def kill_after_last(monkeypatch):
    real = Checkpoints._copy

    def copy(self, name):
        if f'checkpoint-{KILLED_EPOCH}.' in name:
            raise Killed
        real(self, name)

    monkeypatch.setattr(Checkpoints, '_copy', copy)


KILLS = [
    kill_in_epoch, kill_before_summary, kill_in_summary, kill_before_last, kill_in_last, kill_after_last,
]


@pytest.fixture(scope='module')
def whole_runs(whole_run):
    return lambda recipe: whole_run(EPOCHS, RECIPES[recipe])


@pytest.mark.long(but=['main*', 'two*', 'in memory*'])
@pytest.mark.parametrize(
    'recipe, kill',
    [('main process', kill) for kill in KILLS] + [(recipe, kill_in_epoch) for recipe in list(RECIPES)[1:]],
)
def test_killed_run_goes_on_bit_for_bit(image_folder, tmp_path, whole_runs, recipe, kill):
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES[recipe]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill(monkeypatch)
        with pytest.raises(Killed):
            train(image_folder, tmp_path, *options)  # --resume auto of a run that has not begun starts it
    assert (tmp_path / 'run' / 'last.pth.tar').exists()
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs(recipe))


def test_what_the_summary_says_is_done_has_left_its_weights(image_folder, tmp_path, monkeypatch):
    """Others take a run with the row of its last epoch for finished."""
    def write_row(run_dir, row):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, 'write_row', write_row)
        with pytest.raises(Killed):
            train(image_folder, tmp_path, '--epochs', '1')
    assert not read_summary(tmp_path / 'run') and load(tmp_path / 'run' / 'last.pth.tar')['epoch'] == 0
    run = train(image_folder, tmp_path, '--epochs', '1', '--resume', 'auto')
    assert [row['epoch'] for row in read_summary(run)] == [0]


def test_going_back_is_bit_for_bit_the_same(image_folder, tmp_path, whole_runs):
    """To an early checkpoint, all that came later goes; killed again before the epochs that were there are reached."""
    run = shutil.copytree(whole_runs('plateau'), tmp_path / 'run')
    options = ['--epochs', str(EPOCHS), *RECIPES['plateau']]
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_in_epoch(monkeypatch)
        with pytest.raises(Killed):
            train(image_folder, tmp_path, *options, '--resume', str(run / 'checkpoint-0.pth.tar'))
    assert {path.name for path in run.glob('resume-*')} == {f'resume-{epoch}-0.pth' for epoch in range(KILLED_EPOCH)}
    assert_same_run(train(image_folder, tmp_path, *options, '--resume', 'auto'), whole_runs('plateau'))


def test_copies_of_the_user_stay_when_a_run_goes_back(image_folder, tmp_path, whole_runs):
    run = shutil.copytree(whole_runs('plateau'), tmp_path / 'run')
    names = ['checkpoint-3-good.pth.tar', 'checkpoint-3.backup.pth.tar', 'recovery-3-20-keep.pth.tar',
             'resume-3-0-keep-0.pth']
    for name in names:
        shutil.copy(run / 'checkpoint-3.pth.tar', run / name)
    train(image_folder, tmp_path, '--epochs', '3', *RECIPES['plateau'], '--resume', str(run / 'checkpoint-1.pth.tar'))
    assert not (run / 'checkpoint-3.pth.tar').exists()
    assert all((run / name).is_file() for name in names)


def test_what_lies_within_a_later_epoch_goes_before_an_earlier_checkpoint_is_the_last(tmp_path, monkeypatch):
    """A process that is killed between the two would else go on with the line that was left."""
    for epoch in range(3):
        folder = RunFolder(tmp_path)
        folder.open(Checkpoints(tmp_path, 9), '', 'loss')
        folder.save_state(epoch, {})
        folder.save_epoch(epoch, dict(loss=1.), None, 0.1, dict(state_dict={}))
    (tmp_path / 'recovery-3-10.pth.tar.timm-rla.tmp').touch()  # as a kill leaves it
    folder.save_recovery_state(3, 20, dict(position=dict(batches=20)))
    recovery = folder.save_recovery(3, 20, dict(state_dict={}))
    assert folder.find_checkpoint('auto') == recovery

    def killed(*args):
        raise Killed

    monkeypatch.setattr(Checkpoints, 'restore', killed)
    with pytest.raises(Killed):
        folder.go_on(tmp_path / 'checkpoint-0.pth.tar', 1)
    found = folder.find_checkpoint('auto')
    assert found.name == 'last.pth.tar' and load(found)['epoch'] == 0
    assert not list(tmp_path.glob('recovery-*'))


@pytest.mark.parametrize('schedule', [
    ['--sched', 'cosine', '--warmup-epochs', '0'], ['--sched', 'plateau', '--patience-epochs', '0'],
    ['--sched', 'cosine', '--warmup-epochs', '2', '--sched-on-updates'],
])
def test_a_run_that_begins_at_epoch_0_begins_with_the_rates_of_its_schedule(image_folder, tmp_path, schedule):
    """Whatever rate the checkpoint had come to whose weights it takes."""
    options = ['--epochs', '3', '--workers', '0', *schedule]
    first = read_summary(train(image_folder, tmp_path, *options))
    trained = str(tmp_path / 'run' / 'last.pth.tar')
    again = read_summary(train(
        image_folder, tmp_path / 'again', *options, '--resume', trained, '--start-epoch', '0'))
    assert again[0]['lr'] == first[0]['lr'] and len(again) == 3


def test_the_rate_of_the_options_holds_within_the_first_epoch(image_folder, tmp_path):
    options = ['--epochs', '1', '--workers', '0', '--batch-size', '8', '--warmup-epochs', '0', '--lr']
    real = Trainer._backward

    def backward(self, *args):
        loss = real(self, *args)
        if args[-1] == 'epoch 0, batch 2':
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, '_backward', backward)
        with pytest.raises(Stopped):
            train(image_folder, tmp_path, *options, '0.05')
    row, = read_summary(train(image_folder, tmp_path, *options, '0.01', '--resume', 'auto'))
    assert row['lr'] == 0.01


def test_another_number_of_workers_is_said(image_folder, tmp_path, caplog):
    options = ['--batch-size', '8', '--resume', 'auto']
    train(image_folder, tmp_path, '--epochs', '1', '--workers', '1', *options)
    train(image_folder, tmp_path, '--epochs', '2', '--workers', '1', *options)
    assert '--workers' not in caplog.text
    train(image_folder, tmp_path, '--epochs', '3', '--workers', '0', *options)
    assert '--workers 0: 1 before; images are augmented with other random numbers' in caplog.text


def test_a_batch_that_the_network_cannot_take(image_folder, tmp_path, capsys):
    """Of one image without a neighbour: batch norm has nothing to normalise over."""
    options = [*TINY_RUN, '--model', 'rla_resnet18', '--model-kwargs', 'layers=(1,1,1,1)', '--data-dir',
               str(image_folder), '--output', str(tmp_path), '--workers', '0', '--batch-size', '1', '--img-size', '32']
    assert cli.main(['train', *options]) == 2
    assert 'images [1, 3, 32, 32] on cpu: Expected more than 1 value per channel' in capsys.readouterr().err


def test_resume_refuses_to_write_over_a_run(image_folder, tmp_path, capsys):
    options = [*TINY_RUN, '--data-dir', str(image_folder), '--output', str(tmp_path), '--epochs', '1', '--workers',
               '0']
    assert cli.main(['train', *options]) == 0
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    assert cli.main(['train', *options]) == 2
    assert '--resume auto' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before


def test_not_finite_loss_keeps_last_checkpoint(image_folder, tmp_path, capsys):
    options = [*TINY_RUN, '--data-dir', str(image_folder), '--output', str(tmp_path), '--workers', '0',
               '--warmup-epochs', '0', '--sched', 'step']
    assert cli.main(['train', *options, '--epochs', '1']) == 0
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    assert cli.main(['train', *options, '--epochs', '3', '--resume', 'auto', '--no-resume-opt', '--lr', '1e9']) == 2
    assert 'loss is ' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before
    assert len(read_summary(tmp_path / 'run')) == 1


def test_summary_and_args(whole_runs):
    folder = whole_runs('main process')
    with open(folder / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert [int(row['epoch']) for row in rows] == list(range(EPOCHS))
    # args.yaml is a configuration again
    args = parse(train_parser(), ['--config', str(folder / 'args.yaml')])
    assert args.model_kwargs == {'layers': [1, 1, 1]} and args.lr == 0.05 and args.mixup_off_epoch == 3


def test_validate_agrees_with_training(image_folder, whole_runs, capsys):
    folder = whole_runs('two workers')
    options = ['--data-dir', str(image_folder), '--device', 'cpu', '--img-size', '8', '--workers', '0']
    assert cli.main(['validate', '--checkpoint', str(folder / 'last.pth.tar'), *options, '--results-file',
                     str(folder / 'result.csv')]) == 0
    assert '--result' in capsys.readouterr().out
    with open(folder / 'result.csv') as f:
        result = next(csv.DictReader(f))
    assert float(result['top1']) == pytest.approx(read_summary(folder)[-1]['eval_top1'], abs=1e-4)


def test_images_of_another_mode(image_folder, tmp_path, capsys):
    """Later commands convert images as the training did."""
    run = train(image_folder, tmp_path, '--workers', '0', '--epochs', '1', '--input-img-mode', 'HSV')
    network = load_network(NetworkSpec(checkpoint=str(run / 'last.pth.tar')))
    image = Image.open(next((image_folder / 'validation').rglob('*.png')))
    pixels = prepare_network(network).pixels(image)
    assert not pixels[:2].std((1, 2)).any() and pixels[2].std() > 0  # a grey image: neither hue nor saturation
    options = ['--checkpoint', str(run / 'last.pth.tar'), '--data-dir', str(image_folder), '--device', 'cpu',
               '--workers', '0', '--results-file', str(tmp_path / 'result.csv')]
    results = []
    for mode in ([], ['--input-img-mode', 'HSV'], ['--input-img-mode', 'RGB']):
        assert cli.main(['validate', *options, *mode]) == 0
        results.append((tmp_path / 'result.csv').read_text())
    assert results[0] == results[1] != results[2]
    assert cli.main(['validate', *options, '--input-img-mode', 'L']) == 2
    assert '--input-img-mode L: has 1 channel, the network takes 3' in capsys.readouterr().err


def test_gradient_accumulation_equals_large_batch(image_folder, tmp_path):
    """Without batch norm in training mode, whose statistics are those of a small batch, both take the same steps."""
    common = ['--workers', '0', '--no-aug', '--epochs', '2', '--smoothing', '0', '--model-kwargs', 'layers=(1,1,1)',
              'norm_layer=groupnorm1']
    large = train(image_folder, tmp_path / 'large', *common, '--batch-size', '40')
    small = train(image_folder, tmp_path / 'small', *common, '--batch-size', '20', '--grad-accum-steps', '2')
    a, b = load(large / 'last.pth.tar')['state_dict'], load(small / 'last.pth.tar')['state_dict']
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_pad_and_crop(tmp_path):
    """Every crop is one of the 81 windows of the padded image, all of them come up, and the label stays."""
    pixels = np.random.default_rng(0).integers(1, 256, (8, 8), dtype=np.uint8)
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split / '0').mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / 'data' / split / '0' / 'a.png')
    options = ['--train-crop-mode', 'pad', '--hflip', '0', '--color-jitter', '0', '--workers', '0', '--batch-size', '1']
    args = parse(train_parser(), [*TINY_RUN, '--data-dir', str(tmp_path / 'data'), *options])
    config = dict(
        input_size=(3, 8, 8), mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='bilinear', crop_pct=1.)
    place = Placement(torch.device('cpu'))
    splits = open_splits(split_spec(args), 3)
    loader = create_loaders(splits, data_spec(args, 10, 'bilinear'), config, place).train_loader
    padded = np.pad(pixels, 4)
    windows = {padded[y:y + 8, x:x + 8].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = set()
    torch.manual_seed(0)
    for _ in range(1000):
        image, label = loader.dataset[0]
        assert label == 0
        seen.add(windows[np.asarray(image)[0].tobytes()])
    assert len(seen) == 81


def test_what_is_odd_about_a_run_is_said(image_folder, tmp_path, caplog):
    caplog.set_level('INFO')
    options = ['--workers', '0', '--epochs', '1']
    train(image_folder, tmp_path, *options, '--resume', 'auto')
    assert f'--resume auto: no checkpoint in {tmp_path / "run"}, the run begins anew' in caplog.text
    assert '--warmup-epochs 1: all of the 1 epochs are warm-up' in caplog.text
    before = (tmp_path / 'run' / 'summary.csv').read_text()
    caplog.clear()
    train(image_folder, tmp_path, *options, '--resume', str(tmp_path / 'run' / 'last.pth.tar'))
    assert 'Nothing is left to do: ' in caplog.text and 'is at epoch 1 of 1' in caplog.text
    assert (tmp_path / 'run' / 'summary.csv').read_text() == before


def test_lines_come_after_so_many_updates(image_folder, tmp_path, caplog, monkeypatch):
    """Not batches, as in timm's train.py."""
    monkeypatch.setattr('sys.stderr.isatty', lambda: False)
    caplog.set_level('INFO')
    train(image_folder, tmp_path, '--workers', '0', '--epochs', '1', '--grad-accum-steps', '2', '--log-interval', '1')
    steps = [line.split()[2] for line in caplog.messages if line.startswith('Train 1/1 [')]
    assert steps == ['[2/5]', '[4/5]']
