"""A run that is asked to stop, or killed, within an epoch goes on there, to the same end bit for bit."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import TINY_RUN, Killed, assert_same_run, load, train

import timm_rla_cli as cli
from timm_rla.common import evaluation
from timm_rla.common.errors import UserError
from timm_rla.common.stopping import Stopped, StopRequest
from timm_rla.train.epoch import Trainer
from timm_rla.train.folder import RunFolder

EPOCHS, EPOCH, BATCH = 3, 1, 3  # the signal comes in the second epoch, in the fourth batch
RECIPES = {
    'main process': ['--workers', '0', '--mixup', '0.2', '--reprob', '0.5', '--drop', '0.2', '--drop-path', '0.1',
                     '--model-ema', '--model-ema-decay', '0.9'],
    'two workers': ['--workers', '2', '--batch-size', '8', '--cutmix', '1.0', '--reprob', '0.3',
                    '--sched-on-updates'],
    'accumulated': ['--workers', '0', '--batch-size', '8', '--grad-accum-steps', '3', '--train-crop-mode', 'pad'],
    'no prefetcher': ['--workers', '2', '--no-prefetcher', '--mixup', '0.2', '--val-interval', '3'],
    'plateau': ['--workers', '0', '--batch-size', '8', '--sched', 'plateau', '--patience-epochs', '0',
                '--warmup-epochs', '0'],
    'in memory': ['--workers', '0', '--in-memory', '--train-crop-mode', 'pad', '--color-jitter', '0'],
}


@pytest.fixture(scope='module')
def whole_runs(whole_run):
    return lambda recipe: whole_run(EPOCHS, RECIPES[recipe])


def in_batch(monkeypatch, epoch, batch, action):
    """Do something after the backward pass of a batch."""
    real = Trainer._backward

    def backward(self, images, target, group, ends_group, where):
        loss = real(self, images, target, group, ends_group, where)
        if where == f'epoch {epoch}, batch {batch}':
            action()
        return loss

    monkeypatch.setattr(Trainer, '_backward', backward)


def in_validation(monkeypatch, action):
    """Do something in the second batch of the first validation."""
    real, calls = evaluation.utils.accuracy, []

    def accuracy(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation.utils, 'accuracy', accuracy)


def asked(name='SIGTERM'):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.long(but=[f'{EPOCH}-*', '0-0-main*'])
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('epoch, batch', [(EPOCH, BATCH), (0, 0)])
def test_asked_to_stop(image_folder, tmp_path, whole_runs, recipe, epoch, batch):
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES[recipe]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, epoch, batch, asked)
        with pytest.raises(Stopped):
            train(image_folder, tmp_path, *options)
    found, = (tmp_path / 'run').glob('recovery-*.pth.tar')
    assert found.name.startswith(f'recovery-{epoch}-') and load(found)['epoch'] == epoch - 1
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs(recipe))
    assert not list((tmp_path / 'run').glob('recovery-*'))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.long(but=['main*'])
@pytest.mark.parametrize('recipe', ['main process', 'two workers'])
def test_asked_twice_and_while_it_validates(image_folder, tmp_path, whole_runs, hangup, recipe):
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES[recipe]]
    for happens in (
            lambda monkeypatch: in_batch(monkeypatch, 1, 1, asked),
            lambda monkeypatch: in_batch(monkeypatch, 1, 4, lambda: asked('SIGUSR1')),
            lambda monkeypatch: in_validation(monkeypatch, asked),
            lambda monkeypatch: in_validation(monkeypatch, lambda: asked(hangup.name)),
    ):
        with pytest.MonkeyPatch.context() as monkeypatch:
            happens(monkeypatch)
            with pytest.raises(Stopped):
                train(image_folder, tmp_path, *options)
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs(recipe))


def test_killed_between_intervals(image_folder, tmp_path, whole_runs):
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', '--recovery-interval', '2', *RECIPES['two workers']]

    def kill():
        raise Killed

    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, 1, 5, kill)
        with pytest.raises(Killed):
            train(image_folder, tmp_path, *options)
    names = {path.name for path in (tmp_path / 'run').glob('recovery-*')}
    assert names == {'recovery-1-4.pth.tar', 'recovery-1-4-0.pth'}
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs('two workers'))


@pytest.mark.long(but=['0-*.pth'])
@pytest.mark.parametrize('damaged', ['recovery-1-4.pth.tar', 'recovery-1-4-0.pth'])
@pytest.mark.parametrize('room', [0, 1000])
def test_killed_while_it_keeps_the_position(image_folder, tmp_path, whole_runs, damaged, room):
    """What is not whole does not count: the run goes on from the end of the epoch before."""
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', '--recovery-interval', '2', *RECIPES['plateau']]

    def kill(*args):
        raise Killed

    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, 1, 5, kill)
        with pytest.raises(Killed):
            train(image_folder, tmp_path, *options)
    path = tmp_path / 'run' / damaged
    path.write_bytes(path.read_bytes()[:room])
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs('plateau'))


def command(data, output, *options, processes=1):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)] * (processes > 1)
    return [sys.executable, *torchrun, '-m', 'timm_rla', 'train', *TINY_RUN, '--data-dir', str(data), '--output',
            str(output), '--log-interval', '1', *options]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.long
def test_signal_to_all_processes_of_a_job(image_folder, tmp_path, whole_runs):
    """As schedulers send it, data workers included: an exit code of its own, and no process is left."""
    line = command(image_folder, tmp_path, '--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES['two workers'])
    process = subprocess.Popen(
        line, env=dict(os.environ, OMP_NUM_THREADS='1'), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / 'run' / 'checkpoint-0.pth.tar', process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and 'Traceback' not in errors
    assert errors.strip().splitlines()[-1] == (
        'timm-rla train: asked to stop by a signal; --resume auto goes on with this run')
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert_same_run(
        train(image_folder, tmp_path, '--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES['two workers']),
        whole_runs('two workers'))


@pytest.mark.long
def test_two_processes_agree_where_to_stop(image_folder, tmp_path):
    options = ['--epochs', '2', '--workers', '0', '--reprob', '0.3', '--no-ddp-bb', '--batch-size', '4',
               '--model-ema', '--model-ema-decay', '0.9']
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    whole = subprocess.run(command(image_folder, tmp_path / 'whole', *options, processes=2), env=environment,
                           capture_output=True, text=True, timeout=240)
    assert whole.returncode == 0, whole.stderr
    line = command(image_folder, tmp_path, *options, '--resume', 'auto', processes=2)
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / 'run' / 'checkpoint-0.pth.tar', process)
    ranks = [int(pid) for pid in subprocess.run(
        ['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()]
    os.kill(ranks[-1], signal.SIGUSR1)  # one of them alone
    _, errors = process.communicate(timeout=60)
    assert errors.count('asked to stop by a signal') == 1
    assert list((tmp_path / 'run').glob('recovery-1-*.pth.tar'))
    assert len(list((tmp_path / 'run').glob('recovery-1-*-[01].pth'))) == 2
    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert 'going on behind batch' in again.stderr
    assert_same_run(tmp_path / 'run', tmp_path / 'whole' / 'run')


def test_the_state_of_the_last_checkpoint_stays_until_there_is_another(tmp_path):
    """Also where epochs without validation lie between them, and the last one is not kept by epoch."""
    for epoch in (2, 5, 8):
        RunFolder(tmp_path).save_state(epoch, {})
        assert (tmp_path / f'resume-{max(2, epoch - 3)}-0.pth').is_file()
    assert not (tmp_path / 'resume-2-0.pth').exists()
    (tmp_path / 'checkpoint-5.pth.tar').touch()
    RunFolder(tmp_path).save_state(11, {})
    RunFolder(tmp_path).save_state(14, {})
    assert {path.name for path in tmp_path.glob('resume-*')} == {f'resume-{epoch}-0.pth' for epoch in (5, 11, 14)}


@pytest.fixture
def two_processes(tmp_path):
    """Folder of a run of two processes, of which a position within its fourth epoch is kept."""
    for rank in range(2):
        RunFolder(tmp_path, rank, 2).save_recovery_state(3, 5, dict(position=dict(batches=5)))
    RunFolder(tmp_path, 0, 2, dict(batch_size=8)).save_recovery(3, 5, dict(state_dict={'a': torch.zeros(1)}))
    return RunFolder(tmp_path, 0, 2, dict(batch_size=8))


@pytest.mark.parametrize('arguments, words', [
    (dict(world_size=1, cut=dict(batch_size=8)), 'kept with processes 2, not 1'),
    (dict(world_size=2, cut=dict(batch_size=16)), 'kept with batch_size 8, not 16'),
])
def test_an_epoch_that_is_cut_otherwise_begins_anew(two_processes, tmp_path, caplog, arguments, words):
    """Else images would be left out, or come twice."""
    other, checkpoint = RunFolder(tmp_path, **arguments), tmp_path / 'recovery-3-5.pth.tar'
    assert two_processes.find_checkpoint('auto') == checkpoint
    assert other.find_checkpoint('auto') is None and words in caplog.text
    assert two_processes.find_checkpoint(str(checkpoint)) == checkpoint
    with pytest.raises(UserError, match=f'within an epoch, {words}'):
        other.find_checkpoint(str(checkpoint))


@pytest.mark.parametrize('damage', [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:100]),
                                    lambda path: torch.save(dict(position=dict(batches=4)), path),
                                    lambda path: torch.save(dict(position=[5]), path)])
def test_no_process_goes_on_within_an_epoch_alone(two_processes, tmp_path, caplog, damage):
    damage(tmp_path / 'recovery-3-5-1.pth')
    assert two_processes.find_checkpoint('auto') is None
    assert 'recovery-3-5-1.pth beside it is missing or damaged' in caplog.text
    with pytest.raises(UserError, match='recovery-3-5-1.pth beside it is missing or damaged'):
        two_processes.find_checkpoint(str(tmp_path / 'recovery-3-5.pth.tar'))


@pytest.mark.parametrize('recovery', [None, [], dict(batches='5'), dict(batches=-1), dict(batches=True)])
def test_a_position_that_is_none(two_processes, tmp_path, caplog, recovery):
    checkpoint = tmp_path / 'recovery-3-5.pth.tar'
    torch.save(dict(load(checkpoint), recovery=recovery), checkpoint)
    assert two_processes.find_checkpoint('auto') is None and 'damaged, its position' in caplog.text


def test_a_copy_under_another_name(image_folder, tmp_path, whole_runs):
    options = ['--epochs', str(EPOCHS), *RECIPES['main process'], '--resume']
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, EPOCH, BATCH, asked)
        with pytest.raises(Stopped):
            train(image_folder, tmp_path, *options, 'auto')
    found, = (tmp_path / 'run').glob('recovery-*.pth.tar')
    copy = shutil.copy(found, tmp_path / 'run' / 'backup.pth.tar')
    train(image_folder, tmp_path, *options, str(copy))
    copy.unlink()
    assert_same_run(tmp_path / 'run', whole_runs('main process'))


def test_asked_while_it_goes_back_to_its_position(image_folder, tmp_path, whole_runs):
    options = ['--epochs', str(EPOCHS), '--resume', 'auto', *RECIPES['two workers']]
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, EPOCH, 4, asked)
        with pytest.raises(Stopped):
            train(image_folder, tmp_path, *options)
    before = {path.name for path in (tmp_path / 'run').iterdir()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = iter(range(10))
        monkeypatch.setattr(StopRequest, 'agreed', lambda self, placement: next(calls) == 2)
        with pytest.raises(Stopped):
            train(image_folder, tmp_path, *options)
        assert next(calls) == 3
    assert {path.name for path in (tmp_path / 'run').iterdir()} == before
    assert_same_run(train(image_folder, tmp_path, *options), whole_runs('two workers'))


def test_asked_before_the_first_step(image_folder, tmp_path, capsys, monkeypatch):
    """Nothing is there to keep: the process ends at once, also where errors of files are handled."""
    def read(*args):
        try:
            asked()
            time.sleep(10)
        except Exception:
            pytest.fail('taken for an error')

    monkeypatch.setattr('timm_rla.train.run.create_loaders', read)
    options = [*TINY_RUN, '--data-dir', str(image_folder), '--output', str(tmp_path / 'out')]
    assert cli.main(['train', *options]) == 75
    assert '--resume auto goes on with this run' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_never_over_a_run_within_its_first_epoch(image_folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_batch(monkeypatch, 0, 1, asked)
        options = [*TINY_RUN, '--data-dir', str(image_folder), '--output', str(tmp_path), '--workers', '0', '--epochs',
                   '1']
        assert cli.main(['train', *options]) == 75
    assert cli.main(['train', *options]) == 2
    assert 'holds a run; --resume auto goes on with it' in capsys.readouterr().err
    assert cli.main(['train', *options, '--resume', 'auto']) == 0
