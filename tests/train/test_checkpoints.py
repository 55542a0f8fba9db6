"""Checkpoints against timm's own saver, and what is found where they are damaged."""
import os
import random

import pytest
import timm
import torch
from timm.utils import CheckpointSaver

from timm_rla.common.errors import UserError
from timm_rla.train.checkpoints import Checkpoints, Kept, find_last
from timm_rla.train.folder import RunFolder


def kept_files(folder):
    """Epoch in each file."""
    return {path.name: torch.load(path, weights_only=False)['epoch'] for path in folder.glob('*.pth.tar')}


@pytest.mark.parametrize('decreasing', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_same_files_as_timm(tmp_path, seed, decreasing):
    model = torch.nn.Linear(2, 2)
    timms, ours = tmp_path / 'timm', tmp_path / 'ours'
    timms.mkdir()
    ours.mkdir()
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=1), checkpoint_dir=str(timms),
                            recovery_dir=str(timms), decreasing=decreasing, max_history=3)
    checkpoints = Checkpoints(ours, keep=3, decreasing=decreasing)
    metrics = random.Random(seed).choices([1., 2., 3., 4., 5.], k=12)  # with ties
    for epoch, metric in enumerate(metrics):
        saver.save_checkpoint(epoch, metric)
        checkpoints.save(dict(state_dict=model.state_dict()), epoch, metric)
        if epoch == 6:  # as if the run had been resumed
            checkpoints = Checkpoints(ours, keep=3, decreasing=decreasing)
            checkpoints.restore([Kept(*row) for row in enumerate(metrics[:7])], 7)
        assert kept_files(ours) == kept_files(timms)
    assert (checkpoints.best.epoch, checkpoints.best.metric) == (saver.best_epoch, saver.best_metric)
    assert len({path.stat().st_ino for path in ours.iterdir()}) == len(list(ours.iterdir()))


@pytest.mark.parametrize('decreasing', [False, True])
def test_no_number_is_the_worst(tmp_path, decreasing):
    metrics = [float('nan'), 1., 3., float('nan'), 2.]
    checkpoints = Checkpoints(tmp_path, keep=2, decreasing=decreasing)
    for epoch, metric in enumerate(metrics):
        checkpoints.save(dict(state_dict={}), epoch, metric)
    best = 1 if decreasing else 2
    second = {1, 4} if decreasing else {2, 4}
    assert kept_files(tmp_path) == {'last.pth.tar': 4, 'model_best.pth.tar': best,
                                    **{f'checkpoint-{epoch}.pth.tar': epoch for epoch in second}}


def test_fewer_are_kept_when_a_run_goes_on_with_fewer(tmp_path):
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.restore([Kept(epoch, float(epoch)) for epoch in range(5)], 5)
    assert sorted(kept_files(tmp_path).values()) == [3, 4, 4, 4]


def save(folder, epochs):
    checkpoints = Checkpoints(folder)
    model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1))
    for epoch in range(epochs):
        checkpoints.save(dict(state_dict=model.state_dict()), epoch, float(epoch))


@pytest.mark.parametrize('damage', ['missing', 'empty', 'cut', 'text', 'folder of no use'])
def test_the_newest_that_can_be_read(tmp_path, caplog, damage):
    save(tmp_path, 3)
    assert find_last(tmp_path) == tmp_path / 'last.pth.tar' and not caplog.text
    for name in ('last', 'checkpoint-2'):
        path = tmp_path / f'{name}.pth.tar'
        content = path.read_bytes()
        path.unlink()
        if damage == 'folder of no use':
            path.mkdir()
        elif damage != 'missing':
            path.write_bytes({'empty': b'', 'cut': content[:len(content) // 2], 'text': b'epoch 2'}[damage])
    assert find_last(tmp_path) == tmp_path / 'checkpoint-1.pth.tar'
    assert 'last.pth.tar' in caplog.text and f'going on from {tmp_path / "checkpoint-1.pth.tar"}' in caplog.text


def test_never_anew_over_a_run(tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,train_loss\n0,1.0\n1,0.9\n')
    with pytest.raises(UserError, match='--resume auto: .* holds a run without a checkpoint that can be read'):
        RunFolder(tmp_path).find_checkpoint('auto')
    (tmp_path / 'summary.csv').write_text('epoch,train_loss\n0,1.0\n')  # killed before its first checkpoint
    assert RunFolder(tmp_path).find_checkpoint('auto') is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='last.pth.tar: .*No space left on device'):
        save(tmp_path, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_are_flushed_before_they_count(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (events.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda src, dst: (events.append(f'-> {dst}'), replace(src, dst)))
    save(tmp_path, 1)
    last = str(tmp_path / 'last.pth.tar')
    assert events[:3] == [f'{last}.timm-rla.tmp', f'-> {last}', str(tmp_path)]
