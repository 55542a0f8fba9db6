"""Speed and memory: the arithmetic, the processes, and what is counted. No time is ever tested."""
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_benchmark
import torch
import torch.nn as nn
from tiny_benchmark import TINY

from timm_rla.benchmark import measure, processes, workload
from timm_rla.benchmark.allocator import KEEP_FREED
from timm_rla.benchmark.processes import Process
from timm_rla.benchmark.variants import create
from timm_rla.common.errors import UserError

# Times

def test_ratios_are_taken_within_rounds():
    """Against numpy, with a machine whose speed changes tenfold from round to round."""
    rng = np.random.default_rng(0)
    times = rng.uniform(1, 10, (31, 1)) * np.array([1.0, 2.0, 0.5]) * rng.uniform(0.95, 1.05, (31, 3))
    expected = np.percentile(times[:, :1] / times, [25, 50, 75], axis=0)
    found = measure.summarize(torch.from_numpy(times)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found[:, 0] == 1).all() and abs(found[1, 1] - 0.5) < 0.02 and abs(found[1, 2] - 2) < 0.1


def test_models_take_turns():
    calls, reported = [], []

    def model(index):
        calls.append(index)
        return index + len(calls) / 100

    times = measure.take_turns([lambda i=i: model(i) for i in range(3)], 6, lambda t: reported.append(len(t)))
    rounds = [calls[i:i + 3] for i in range(0, 18, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds) and rounds[1] == rounds[0][::-1]
    assert {n for place in zip(*rounds) for n in Counter(place).values()} == {2}  # each model twice in each place
    assert reported == [1, 2, 3, 4, 5, 6] and times.shape == (6, 3)
    assert [[int(t) for t in row] for row in times] == [[0, 1, 2]] * 6


# Sizes and memory

@pytest.mark.parametrize('name, img_size, gmacs, macts, params', [
    ('resnet18', 224, 1.82, 2.48, 11.69),  # timm's results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv
    ('resnet50', 160, 2.1, 5.67, 25.56),
    ('rla_resnet20_cifar', 32, 0.0406, 0.19, 0.27),
])
def test_sizes_are_those_of_timm(name, img_size, gmacs, macts, params):
    size = workload.count(create(name), img_size)
    assert size['gmacs'] == pytest.approx(gmacs, rel=0.01)  # timm's profiler also counts norms and pooling
    assert round(size['macts'], 2) == macts and round(size['param_count'], 2) == params


def test_sizes_of_a_detector_are_those_of_the_image():
    """Which reaches the network as it is."""
    model, seen = create('resnet18+layers=(1,1,1,1)+fpn', as_run=False), []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    small, large = (workload.count(model, size)['gmacs'] for size in (48, 480))
    assert seen == [(1, 3, 64, 64), (1, 3, 480, 640)] and small < large


def test_peak_memory_is_exact():
    x = torch.zeros(1000)
    kept = []

    def step():
        y = x.double()  # 8000 bytes
        kept.append(y.float())  # 4000, both alive
        del y
        kept.append(x.clone())  # 4000, in place of the 8000

    assert workload.peak_memory(step) == 12000
    kept.clear()
    assert workload.peak_memory(lambda: kept.append(x.clone())) == 4000  # not less for tensors that were there before


@pytest.mark.parametrize('backend', ['', 'aot_eager'])
def test_memory_of_a_step(backend):
    """An example that can be counted by hand: two layers without bias, SGD with momentum."""
    layers = nn.Linear(3 * 16 * 16, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False)
    model = nn.Sequential(nn.Flatten(), *layers)
    model.num_classes = 10
    setting = replace(TINY, batch_size=1024, img_size=16, torchcompile=backend)
    parameters, images, hidden = 4 * (768 * 64 + 64 * 10), 4 * 1024 * 768, 4 * 1024 * 64

    subject = workload.Workload(model, setting)
    subject.warm_up(1e-3)
    expected = parameters + images + 8 * 1024 + 2 * hidden  # before and after the ReLU
    assert expected <= subject.memory() <= expected + 2048

    subject = workload.Workload(model, replace(setting, mode='train'))
    subject.warm_up(1e-3)
    found = [subject.memory() for _ in range(2)]
    assert found[0] == found[1]
    assert 2 * parameters + images + 2 * hidden < found[0] < 4 * parameters + images + 4 * hidden


@pytest.mark.parametrize('mode', ['train', 'infer'])
def test_steps_from_memory(mode, monkeypatch):
    """Each step has other images, in the type and layout of the setting, also behind the last batch of the data set."""
    monkeypatch.setattr(workload, 'DATASET', 12)
    model = create('rla_resnet20_cifar+layers=(1,1,1)')
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    setting = replace(TINY, mode=mode, batch_size=4, img_size=16, channels_last=True)
    subject = workload.Workload(model, setting, in_memory=True)
    for _ in range(4):
        subject.step()
    assert len({images.sum().item() for images in seen[:3]}) == 3 and torch.equal(seen[3], seen[0])
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    assert -2 <= seen[0].min() < -1.9 and 1.9 < seen[0].max() <= 2 and seen[0].shape == (4, 3, 16, 16)
    pixels = 12 * 3 * (16 + 2 * workload.PAD) ** 2
    assert subject.memory() > pixels + 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('neck', ['fpn', 'c4'])
@pytest.mark.parametrize('mode', ['train', 'infer'])
def test_steps_of_a_detector(neck, mode):
    """Images reach the network as they are, and a step of training reaches all that is trained."""
    setting = replace(TINY, mode=mode, batch_size=1, img_size=48)
    model = create(f'rla_resnet18+layers=(1,1,1,1)+{neck}')
    model.rpn._post_nms_top_n = dict(training=20, testing=20)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    subject = workload.Workload(model, setting)
    subject.step()
    assert seen == [(1, 3, 64, 64)]  # 48 x 64, filled up to multiples of 32
    assert all((p.grad is not None) == (p.requires_grad and mode == 'train') for p in model.parameters())
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert subject.memory() > parameters * (1 + (mode == 'train')) * 0.99


# Processes

class FakeProcess:
    """Answers as a process would that needs no time; `log` tells what was asked of all of them."""
    log = []

    def __init__(self, name, setting):
        self.name = name
        self.log.append(name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.append('end')

    def ready(self):
        self.log.append('ready')
        return 'an allocator'

    def call(self, method, *args):
        self.log.append((method, *args))
        return {'prepare': None, 'warm_up': 3, 'memory': 2 ** 20, 'time': 0.5}[method]


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(measure, 'Process', FakeProcess)
    monkeypatch.setattr(FakeProcess, 'log', [])
    return FakeProcess.log


def test_out_of_memory_names_model_and_batch(monkeypatch):
    class Full(FakeProcess):
        def call(self, method, *args):
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nMore')

    monkeypatch.setattr(measure, 'Process', Full)
    with pytest.raises(UserError, match='^resnet20_cifar, infer, batch 2, 32 px, float32: CUDA out of memory.* More$'):
        measure.measure(TINY, rounds=1, seconds=1e-3)


START = [*TINY.models, 'ready', 'ready', *2 * [('warm_up', 1e-3)]]
TIME, END = ('time', 3), ['end', 'end']


def test_processes_are_started_anew_and_share_the_rounds(log):
    """On a CPU, the processes whose memory is measured end before others start, and time nothing."""
    rows = measure.measure(TINY, rounds=7, seconds=1e-3, starts=3)
    memory = [entry for name in TINY.models for entry in (name, 'ready', ('prepare',), ('memory',), 'end')]
    assert log == [*memory, *START, *4 * [TIME], *END, *START, *4 * [TIME], *END, *START, *6 * [TIME], *END]
    assert [row['rounds'] for row in rows] == [7, 7] and rows[1]['ratio'] == 1
    assert [row['allocator'] for row in rows] == 2 * ['an allocator']
    assert [row['peak_memory_mib'] for row in rows] == [1, 1]


def test_memory_on_a_gpu_is_measured_at_the_first_start(log, monkeypatch):
    monkeypatch.setattr(measure, 'describe_environment', lambda device: dict(hardware=device))
    rows = measure.measure(replace(TINY, device='cuda'), rounds=2, seconds=1e-3, starts=2)
    assert log == [*START, *2 * [('memory',)], *2 * [TIME], *END, *START, *2 * [TIME], *END]
    assert [row['peak_memory_mib'] for row in rows] == [1, 1]


def test_nothing_is_timed_before_all_are_ready(log, monkeypatch):
    def ready(self):
        log.append('ready')
        if len(log) > 12 and self.name == TINY.models[1]:
            raise UserError('an op is wrong')

    monkeypatch.setattr(FakeProcess, 'ready', ready)
    with pytest.raises(UserError, match='an op is wrong'):
        measure.measure(TINY, rounds=1, seconds=1e-3)
    assert log[10:] == [*TINY.models, 'ready', 'ready', *END]


def test_a_process_runs_one_model(monkeypatch):
    for name in [*KEEP_FREED, 'LD_PRELOAD', 'GLIBC_TUNABLES']:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with Process(TINY.models[0], TINY) as process:
            assert not set(KEEP_FREED) & set(os.environ)
            assert process.ready() == ' '.join(['glibc,', *(f'{name}={value}' for name, value in KEEP_FREED.items())])
            assert process.call('warm_up', 1e-3) >= 1
            assert process._executor.submit(torch.get_num_threads).result() == 1
            assert process._executor.submit(os.getpid).result() != os.getpid()
            kept = process._executor.submit(tiny_benchmark.memory_kept_of, 2 ** 28).result()
            assert kept > 0.9 * 2 ** 28
            with pytest.raises(UserError, match='^--model resnet19_cifar: no such model'):
                process._executor.submit(processes._start, 'resnet19_cifar', TINY, 1).result()
            with pytest.raises(AttributeError, match='no_such_method'):
                process.call('no_such_method')
    finally:
        torch.set_num_threads(threads)


def test_ops_are_verified_as_they_run(monkeypatch):
    """Those of a model that compiles its tails too, in a setting that is not compiled."""
    asked = []
    monkeypatch.setattr(processes, 'verify', lambda setting, backend: asked.append((setting, backend)))
    for name in 'resnet20_cifar', 'rla_resnet20_cifar', 'rla_resnet20_cifar+regional':
        assert processes._start(name, TINY, 1)
    assert asked == [(TINY, ''), (TINY, 'inductor')]
    processes._workload = None
