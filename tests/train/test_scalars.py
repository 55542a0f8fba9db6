"""Weights & Biases, offline, and TensorBoard get what stands in summary.csv."""
import csv
import glob
import os
import struct
import time

import pytest
from wandb.proto import wandb_internal_pb2

import timm_rla_cli as cli

TRAIN = ['train', '--device', 'cpu', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--img-size',
         '8', '--batch-size', '16', '--workers', '0', '--warmup-epochs', '0', '--experiment', 'run']


@pytest.fixture
def run(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')

    def train(*options):
        assert cli.main([*TRAIN, '--data-dir', str(image_folder), *options]) == 0
        with open(tmp_path / 'output' / 'train' / 'run' / 'summary.csv', newline='') as f:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]

    return train


def tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag.replace('/', '_'): [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()['scalars']}


def test_tensorboard_over_a_resume(run, tmp_path):
    run('--log-tensorboard', '--epochs', '1')
    rows = run('--log-tensorboard', '--epochs', '3', '--resume', 'auto')
    found = tensorboard_scalars(tmp_path / 'output' / 'train' / 'run' / 'tensorboard')
    assert set(found) == set(rows[0]) - {'epoch'}
    for name, values in found.items():
        assert [step for step, _ in values] == [0, 1, 2]
        assert [value for _, value in values] == pytest.approx([row[name] for row in rows], rel=1e-6)


def leveldb_records(path):
    """Records of a file in the log format of LevelDB, which a file of 7 bytes of its own begins with."""
    with open(path, 'rb') as f:
        blocks = f.read()
    position, whole = 7, b''
    while position + 7 <= len(blocks):
        if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack('<IHB', blocks[position:position + 7])
        whole += blocks[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b''


def history_of(path):
    """Rows that a run has logged, without what Weights & Biases itself adds."""
    history = []
    for data in leveldb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof('record_type') == 'history':
            items = {item.key or '/'.join(item.nested_key): item.value_json for item in record.history.item}
            history.append({key: float(value) for key, value in items.items() if not key.startswith('_')})
    return history


def test_wandb(run, tmp_path):
    rows = run('--log-wandb', '--wandb-project', 'test', '--epochs', '2')
    import wandb

    wandb.finish()
    (path,) = glob.glob(os.path.join(tmp_path, 'wandb', 'offline-run-*', '*.wandb'))
    deadline = time.monotonic() + 30  # another process writes it
    while len(history := history_of(path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert history == [pytest.approx(row) for row in rows]
