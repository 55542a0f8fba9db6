"""The folder of a run: one writer at a time, labels that are true after going back, a disk that is full."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import TINY_RUN, assert_same_run, load, train

import timm_rla_cli as cli
from timm_rla.common.errors import UserError
from timm_rla.common.summary import read_summary
from timm_rla.hub.export import export
from timm_rla.train.folder import RunFolder

OPTIONS = ['--workers', '0', '--warmup-epochs', '0', '--sched', 'step']


def line(data, output, *options):
    return ['train', *TINY_RUN, '--data-dir', str(data), '--output', str(output), *OPTIONS, *options]


def files_of(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


# One writer ----------------------------------------------------------------------------------------------------------

def test_two_runs_in_one_folder(image_folder, tmp_path, capsys):
    folder = RunFolder(tmp_path / 'run')
    with folder.locked():
        before = sorted(path.name for path in (tmp_path / 'run').iterdir())
        assert cli.main(line(image_folder, tmp_path, '--epochs', '1')) == 2
        error = capsys.readouterr().err
        assert f'process {os.getpid()} on ' in error and f'writes to {tmp_path / "run"}' in error
        assert sorted(path.name for path in (tmp_path / 'run').iterdir()) == before
    assert not (tmp_path / 'run').exists()  # nothing has come of it
    assert cli.main(line(image_folder, tmp_path, '--epochs', '1')) == 0


def test_death_frees_the_folder(image_folder, tmp_path):
    holder = subprocess.Popen([sys.executable, '-c', f'''
import time
from pathlib import Path
from timm_rla.train.folder import RunFolder
with RunFolder(Path({str(tmp_path / "run")!r})).locked():
    print('locked', flush=True)
    time.sleep(100)
'''], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'locked\n'
    with pytest.raises(UserError, match=f'process {holder.pid} '), RunFolder(tmp_path / 'run').locked():
        pass
    holder.kill()
    holder.wait()
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '1')
    assert len(read_summary(tmp_path / 'run')) == 1


def test_a_folder_with_checkpoints_alone_is_a_run(image_folder, tmp_path, capsys):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '2')
    (run / 'summary.csv').unlink()
    before = files_of(run)
    assert cli.main(line(image_folder, tmp_path, '--epochs', '1', '--seed', '5')) == 2
    assert '--resume auto goes on with it' in capsys.readouterr().err
    assert files_of(run) == before
    for path in run.glob('*.pth.tar'):
        path.write_bytes(b'damaged')
    before = files_of(run)
    assert cli.main(line(image_folder, tmp_path, '--epochs', '1', '--resume', 'auto')) == 2
    assert 'holds a run without a checkpoint that can be read' in capsys.readouterr().err
    assert files_of(run) == before


def test_a_checkpoint_of_others_is_no_run(image_folder, tmp_path):
    (tmp_path / 'run').mkdir()
    torch.save({}, tmp_path / 'run' / 'initial.pth.tar')
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '1')


# Going back ----------------------------------------------------------------------------------------------------------

def epochs_of(folder):
    return {path.name: load(path)['epoch'] for path in folder.glob('*.pth.tar')}


def check_labels(folder):
    """Names, best checkpoint and summary belong to the weights that are in the files."""
    rows = {int(row['epoch']): row for row in read_summary(folder)}
    for name, epoch in epochs_of(folder).items():
        content = load(folder / name)
        assert content['summary'] == rows[epoch] and content['metric'] == rows[epoch]['eval_top1']
        if name.startswith('checkpoint-'):
            assert name == f'checkpoint-{epoch}.pth.tar'
    best = max(row['eval_top1'] for row in rows.values())
    assert load(folder / 'model_best.pth.tar')['metric'] == best
    assert load(folder / 'last.pth.tar')['epoch'] == max(rows)


def test_going_back(image_folder, tmp_path):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '5', '--seed', '3')
    assert set(epochs_of(run).values()) == {0, 1, 2, 3, 4}
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '4', '--resume', str(run / 'checkpoint-1.pth.tar'), '--lr',
          '0.001', '--seed', '7')
    check_labels(run)
    assert set(epochs_of(run).values()) == {0, 1, 2, 3}


@pytest.mark.parametrize('content', [
    dict(rng=5), dict(rng={}), dict(rng=dict(torch=torch.zeros(3))), dict(train_workers=5), dict(buffers=5),
    dict(position=5), dict(position=dict(batches=10 ** 9)),
], ids=str)
def test_nothing_is_deleted_before_all_is_read(image_folder, tmp_path, capsys, content):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '3')
    torch.save(content, run / 'resume-0-0.pth')
    before = files_of(run)
    code = cli.main(line(image_folder, tmp_path, '--epochs', '3', '--resume', str(run / 'checkpoint-0.pth.tar')))
    if code:
        assert code == 2 and 'damaged state of process 0' in capsys.readouterr().err
        assert files_of(run) == before
    else:  # a position belongs to checkpoints within an epoch alone
        assert 'position' in content
        check_labels(run)


def test_another_optimizer_is_refused_before_anything_changes(image_folder, tmp_path, capsys):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '2')
    before = files_of(run)
    assert cli.main(line(image_folder, tmp_path / 'other', '--epochs', '1', '--resume', str(run / 'last.pth.tar'),
                         '--opt', 'Momentum')) == 0  # the same as sgd, from its state
    for opt in 'lamb', 'adamw':
        assert cli.main(line(image_folder, tmp_path, '--epochs', '3', '--resume', 'auto', '--opt', opt)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f'--opt {opt}: ' in error and 'was trained with sgd; --no-resume-opt' in error
        assert files_of(run) == before
    assert cli.main(line(
        image_folder, tmp_path, '--epochs', '3', '--resume', 'auto', '--opt', 'adamw', '--no-resume-opt')) == 0


def test_options_that_the_state_of_the_optimizer_overrules_are_said(image_folder, tmp_path, capsys):
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '1')
    capsys.readouterr()
    common = ['--epochs', '2', '--resume', 'auto']
    assert cli.main(line(image_folder, tmp_path, *common, '--weight-decay', '0.5', '--momentum', '0.1')) == 0
    assert 'goes on with its own momentum, weight_decay' in capsys.readouterr().err
    assert cli.main(line(image_folder, tmp_path, '--epochs', '3', '--resume', 'auto')) == 0
    assert 'goes on with its own' not in capsys.readouterr().err


def test_another_seed_is_said(image_folder, tmp_path, capsys):
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '1', '--seed', '3')
    capsys.readouterr()
    for epochs, seed in ('2', '4'), ('3', '4'):
        assert cli.main(line(image_folder, tmp_path, '--epochs', epochs, '--resume', 'auto', '--seed', seed)) == 0
        said = 'was trained with seed 3, whose random numbers go on where' in capsys.readouterr().err
        assert said == (epochs == '2')


@pytest.mark.parametrize('name', ['checkpoint-2.pth.tar', 'resume-7-0.pth', 'recovery-0-1.pth.tar'])
def test_a_folder_in_the_place_of_a_file(image_folder, tmp_path, capsys, name):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '1')
    (run / name).mkdir()
    assert cli.main(line(image_folder, tmp_path, '--epochs', '2', '--resume', 'auto')) in (0, 2)
    assert 'Traceback' not in capsys.readouterr().err
    (run / name).rmdir()
    assert cli.main(line(image_folder, tmp_path, '--epochs', '4', '--resume', 'auto')) == 0
    check_labels(run)


@pytest.mark.parametrize('opt', ['adafactorbv', 'adafactor', 'lamb'])
def test_factored_state_of_an_optimizer(image_folder, tmp_path, opt):
    options = [*OPTIONS, '--opt', opt, '--lr', '0.001', '--epochs']
    train(image_folder, tmp_path, *options, '1')
    resumed = train(image_folder, tmp_path, *options, '2', '--resume', 'auto')
    assert_same_run(resumed, train(image_folder, tmp_path / 'whole', *options, '2'))


@pytest.mark.parametrize('hist', ['1', '2', '10'])
def test_going_back_and_killed_at_once(image_folder, tmp_path, monkeypatch, hist):
    """Before the first new epoch is done, --resume auto goes on from where the run has gone back to."""
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '4', '--checkpoint-hist', hist)
    kept = sorted(int(path.name.split('-')[1].split('.')[0]) for path in run.glob('checkpoint-*.pth.tar'))
    back = run / f'checkpoint-{kept[0]}.pth.tar'
    with monkeypatch.context() as m:
        m.setattr('timm_rla.train.run.run_epochs', lambda *args: (_ for _ in ()).throw(UserError('killed')))
        with pytest.raises(UserError, match='killed'):
            train(image_folder, tmp_path, *OPTIONS, '--epochs', '4', '--checkpoint-hist', hist, '--resume', str(back))
    assert max(epochs_of(run).values()) == kept[0] and load(run / 'last.pth.tar')['epoch'] == kept[0]
    train(image_folder, tmp_path, *OPTIONS, '--epochs', '4', '--checkpoint-hist', hist, '--resume', 'auto')
    check_labels(run)


def test_card_is_of_the_weights(image_folder, tmp_path):
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '3')
    own = load(run / 'checkpoint-0.pth.tar')['summary']
    (run / 'summary.csv').write_text((run / 'summary.csv').read_text().replace('\n0,', '\n9,'))
    card = (export(run / 'checkpoint-0.pth.tar', tmp_path / 'out') / 'README.md').read_text()
    assert f'| {own["eval_top1"]:.2f} % | {own["eval_top5"]:.2f} % | {own["eval_loss"]:.4f} |' in card
    content = load(run / 'checkpoint-1.pth.tar')  # of timm's script: no figures but the metric
    del content['summary']
    torch.save(dict(content, metric=-1.), run / 'other.pth.tar')
    assert '## Accuracy' not in (export(run / 'other.pth.tar', tmp_path / 'other') / 'README.md').read_text()


@pytest.mark.parametrize('content', [b'', b'\xff\xfe\x00garbage', None])
def test_a_lost_summary_gets_the_rows_of_the_checkpoints(image_folder, tmp_path, content):
    """So that a run that had ended counts as finished, and files belong to their names in one that goes on."""
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '2')
    whole = (run / 'summary.csv').read_text()
    for epochs in '2', '3':
        (run / 'summary.csv').unlink()
        if content is not None:
            (run / 'summary.csv').write_bytes(content)
        train(image_folder, tmp_path, *OPTIONS, '--epochs', epochs, '--resume', 'auto')
        assert (run / 'summary.csv').read_text().startswith(whole)
        assert [row['epoch'] for row in read_summary(run)] == list(range(int(epochs)))
        check_labels(run)


# Disks ---------------------------------------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.parametrize('room', [20, 100_000])
def test_full_disk(image_folder, tmp_path, room):
    """No file may grow beyond `room` bytes from some moment on: one line, and the last good checkpoint is there."""
    run = train(image_folder, tmp_path, *OPTIONS, '--epochs', '1')
    before = {path.name: path.read_bytes() for path in run.glob('*.pth.tar')}
    again = line(image_folder, tmp_path, '--epochs', '2', '--resume', 'auto')
    code = 'import resource, signal, sys, timm_rla.commands.train, timm_rla_cli as cli\n' \
           'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n' \
           f'resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n' \
           'sys.exit(cli.main(sys.argv[1:]))'  # not before the imports: torch 2.5 writes a file then
    result = subprocess.run([sys.executable, '-c', code, *again], capture_output=True, text=True, timeout=120,
                            env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert result.returncode == 2, result.stderr
    assert 'Traceback' not in result.stderr and f'error: {run}' in result.stderr.strip().splitlines()[-1]
    for name, content in before.items():
        assert (run / name).read_bytes() == content
    assert not list(run.glob('*.tmp'))
    whole = train(image_folder, tmp_path / 'whole', *OPTIONS, '--epochs', '2')
    assert_same_run(train(image_folder, tmp_path, *OPTIONS, '--epochs', '2', '--resume', 'auto'), whole)


@pytest.mark.parametrize('name, words', [
    ('x' * 300, 'File name too long'), ('file/run', 'Not a directory'),
])
def test_names_that_no_folder_can_have(image_folder, tmp_path, capsys, name, words):
    (tmp_path / 'file').write_text('')
    options = line(image_folder, tmp_path, '--epochs', '1', '--resume', 'auto')
    options[options.index('--experiment') + 1] = name
    assert cli.main(options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and len(error) < 1200


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(image_folder, tmp_path, capsys):
    (tmp_path / 'out').mkdir(mode=0o555)
    assert cli.main(line(image_folder, tmp_path / 'out', '--epochs', '1')) == 2
    assert 'Permission denied' in capsys.readouterr().err


def test_interrupted_by_hand(image_folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_rla', *line(image_folder, tmp_path, '--epochs', '500')],
        stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # shells let it be ignored in the background
    deadline = time.monotonic() + 60
    while not (tmp_path / 'run' / 'last.pth.tar').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and 'Traceback' not in errors and errors.endswith('timm-rla train: interrupted\n')
