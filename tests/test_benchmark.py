"""The benchmark: its arithmetic, its table and what it runs. No time is ever tested."""
import csv
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_rla import cli
from timm_rla.benchmark import command, measure, results, suites, workload
from timm_rla.benchmark.suites import SCALING, SUITES, Setting
from timm_rla.errors import UserError

TINY = Setting(('resnet20_cifar', 'rla_resnet20_cifar'), mode='infer', batch_size=2, img_size=32, device='cpu')
OPTIONS = ['--device', 'cpu', '--models', *TINY.models, '--batch-size', '2', '--rounds', '2', '--seconds', '0.001',
           '--starts', '1']


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


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
    size = workload.count(workload.create(name), img_size)
    assert size['gmacs'] == pytest.approx(gmacs, rel=0.01)  # timm's profiler also counts norms and pooling
    assert round(size['macts'], 2) == macts and round(size['param_count'], 2) == params


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


def test_names():
    model = workload.create('rla_resnet20_cifar+hidden_dim=8+layers=(1,1,1)')
    assert model.lstm.hidden_size == 8 and len(model.layer1) == 1 and not model.training
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    expected = workload.create('rla_resnet20_cifar')(images)
    torch.manual_seed(0)
    torch.testing.assert_close(workload.create('rla_resnet20_cifar+folded')(images), expected)


# Suites

@pytest.mark.parametrize('suite', SUITES)
def test_settings_of_a_suite_differ_and_exist(suite):
    settings = SUITES[suite]
    assert len({tuple(setting.columns().items()) for setting in settings}) == len(settings)
    assert len({setting.name for setting in settings}) == len(settings)
    for name in {name for setting in settings for name in setting.models}:
        with torch.device('meta'):
            workload.create(name.replace('+folded', ''))
    assert all(setting.precision in workload.PRECISIONS for setting in settings)
    assert not any('folded' in name for setting in settings if setting.mode == 'train' for name in setting.models)


def test_scaling_follows_one_axis_at_a_time():
    for name, axes in SCALING.items():
        for points in axes.values():
            assert len({point.value for point in points}) == len(points) >= 3
            assert all(point.model in point.setting.models[1:] and point.setting in SUITES[name] for point in points)
        base = axes['M'][0].setting
        for axis, column in (('batch', 'train_batch_size'), ('pixels', 'train_img_size'), ('depth', 'baseline')):
            for point in axes[axis]:
                differing = {key for key, value in base.columns().items() if point.setting.columns()[key] != value}
                assert differing <= {column}


def parse(*argv):
    parser = command.benchmark_parser()
    return command.settings(parser.parse_args(list(argv)), parser)


def test_options_make_settings():
    found = parse(
        '--device', 'cpu', '--models', 'seresnet18', 'resnet18', '--baseline', 'resnet18', '--batch-size', '4', '8',
        '--precision', 'amp_bfloat16', '--channels-last', '--torchcompile', '--model-kwargs', 'in_chans=3')
    assert [(setting.mode, setting.batch_size) for setting in found] == [
        ('train', 4), ('train', 8), ('infer', 4), ('infer', 8)]
    assert found[0] == Setting(
        ('resnet18+in_chans=3', 'seresnet18+in_chans=3'), 'train', 4, 224, 'cpu', 'amp_bfloat16', True, 'inductor')
    names = {setting.name for setting in parse('--suite', 'cpu', '--only', 'resnet50-train', 'b1-')}
    assert names == {f'resnet50-train-{how}-b16-128px' for how in ('eager', 'compiled')} | {
        f'resnet{depth}-infer-eager-b1-224px' for depth in (18, 50, 101)}


# Table

def test_rows_of_the_same_setting_are_replaced(tmp_path):
    path = tmp_path / 'new' / 'table.csv'
    results.check_output(path)
    assert not path.exists() and not any(path.parent.iterdir())

    def rows(ratio, **changes):
        setting = replace(TINY, **changes)
        return [dict(setting.columns(), model=name, ratio=ratio, hardware='x', date='2020-01-01')
                for name in setting.models]

    results.update(path, rows(1))
    results.update(path, rows(2, batch_size=4))
    results.update(path, rows(3, mode='train'))
    results.update(path, rows(4))
    results.update(path, [dict(row, hardware='y', date='2020-01-02') for row in rows(5, batch_size=4)])
    assert list(rows_of(path)[0]) == list(results.COLUMNS)
    assert [row['ratio'] for row in rows_of(path)] == ['4', '4', '2', '2', '3', '3', '5', '5']
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = results.find(results.read(path), replace(TINY, batch_size=4))
    assert {name: row['ratio'] for name, row in found.items()} == dict.fromkeys(TINY.models, '5')  # the latest
    assert not results.find(results.read(path), replace(TINY, batch_size=8))


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'table.csv'
    results.update(path, [dict(TINY.columns(), model='a')])
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.csv.DictWriter, 'writerows', interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.update(path, [dict(TINY.columns(), model='b')])
    assert path.read_bytes() == before


# All of it

def test_end_to_end(tmp_path, capsys):
    path = tmp_path / 'table.csv'
    base, rla = (f'{name}+layers=(1,1,1)' for name in TINY.models)
    options = ['benchmark', *OPTIONS, '--output', str(path)]
    assert cli.main([*options, '--torchcompile', 'eager', '--model-kwargs', 'layers=(1,1,1)']) == 0
    assert cli.main([*options, '--models', base, rla, f'{rla}+folded', '--modes', 'infer',
                     '--precision', 'amp_bfloat16', '--channels-last']) == 0
    rows = rows_of(path)
    assert [(row['mode'], row['model']) for row in rows] == [
        ('train', base), ('train', rla), ('infer', base), ('infer', rla),
        ('infer', base), ('infer', rla), ('infer', f'{rla}+folded')]
    for row in rows:
        filled = {column for column, value in row.items() if value}
        other = 'infer' if row['mode'] == 'train' else 'train'
        optional = {'torchcompile', 'torchcompile_mode'}
        assert filled | optional == {c for c in results.COLUMNS if not c.startswith(f'{other}_')} | optional
        assert row['baseline'] == base and row['rounds'] == '2' and row['device'] == 'cpu'
        assert float(row['ratio_lower']) <= float(row['ratio']) <= float(row['ratio_upper'])
        step_time, speed = (float(row[f'{row["mode"]}_{c}']) for c in ('step_time', 'samples_per_sec'))
        assert step_time * speed == pytest.approx(1000 * 2, rel=0.01)
    assert [(row['precision'], row['layout'], row['torchcompile']) for row in rows] == \
        4 * [('float32', 'nchw', 'eager')] + 3 * [('amp_bfloat16', 'nhwc', '')]
    for row in rows[:2]:
        assert float(row['param_count']) == sum(p.numel() for p in workload.create(row['model']).parameters()) / 1e6
    assert all(float(row['ratio']) == float(row['memory_ratio']) == 1
               for row in rows if row['model'] == row['baseline'])
    out = capsys.readouterr().out
    assert out.count('images/s') == 3 and out.strip().endswith(str(path))


def test_suite_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    settings = [TINY, replace(TINY, batch_size=1)]
    monkeypatch.setitem(suites.SUITES, 'cpu', settings)
    monkeypatch.chdir(tmp_path)
    measured = []

    def interrupted(setting, *args, **kwargs):
        if measured:
            raise KeyboardInterrupt
        measured.append(setting)
        return measure.measure(setting, *args, **kwargs)

    options = ['benchmark', '--suite', 'cpu', '--rounds', '1', '--seconds', '0.001']
    monkeypatch.setattr(command, 'measure', interrupted)
    assert cli.main(options) == 130
    assert len(rows_of('results/benchmark-cpu.csv')) == 2
    monkeypatch.setattr(command, 'measure', lambda s, *a, **k: measured.append(s) or measure.measure(s, *a, **k))
    assert cli.main([*options, '--missing']) == 0
    assert measured == settings and len(rows_of('results/benchmark-cpu.csv')) == 4
    assert cli.main([*options, '--missing']) == 0
    assert len(measured) == 2 and 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('options, words', [
    (['--models', 'resnet20_cifar', 'rla_resnet20_cifer'], ['rla_resnet20_cifer', 'rla_resnet20_cifar']),
    (['--models', 'rla_resnet20_cifar+hiden_dim=8'], ['hiden_dim', 'hidden_dim']),
    (['--models', 'rla_resnet20_cifar+context=gup'], ['gup', 'gmp_mlp']),
    (['--models', 'rla_resnet20_cifar+fold'], ['fold', 'folded', 'KEY=VALUE']),
    (['--models', 'rla_resnet20_cifar+folded'], ['rla_resnet20_cifar+folded', '--modes infer']),
    (['--models', 'resnet20_cifar', 'resnet20_cifar'], ['resnet20_cifar', 'twice']),
    (['--model-kwargs', 'hidden_dim'], ['hidden_dim', 'KEY=VALUE']),
    (['--baseline', 'resnet18'], ['--baseline', 'resnet18', *TINY.models]),
    (['--modes', 'test'], ['test', 'train', 'infer']),
    (['--batch-size', '0'], ['--batch-size', '0']),
    (['--batch-size', '99999999999'], ['resnet20_cifar', '99999999999']),
    (['--img-size', '-1'], ['--img-size', '-1']),
    (['--rounds', '0'], ['--rounds', '0']),
    (['--rounds', 'many'], ['--rounds', 'many', 'int']),
    (['--seconds', 'nan'], ['--seconds', 'nan']),
    (['--threads', '0'], ['--threads', '0']),
    (['--device', 'cuda:99'], ['cuda:99', 'CUDA']),
    (['--device', 'meta'], ['meta', 'cpu', 'cuda']),
    (['--device', 'gpu'], ['gpu']),
    (['--precision', 'fp8'], ['fp8', 'amp_bfloat16']),
    (['--torchcompile', 'inducktor'], ['inducktor']),
    (['--torchcompile', '--torchcompile-mode', 'fast'], ['fast']),
    (['--suite', 'cpu'], ['--models', '--suite']),
    (['--only', 'train'], ['--only', '--suite']),
    (['--output', '.'], ['.']),
    (['--output', 'file/table.csv'], ['file/table.csv']),
    (['--output', 'file'], ['file', 'columns']),
    (['--fold'], ['--fold']),
], ids=' '.join)
def test_bad_input(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('a,b\n1,2\n')
    assert cli.main(['benchmark', *OPTIONS, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if 'warming up' not in line]
    assert len(lines) == 1 and lines[0].startswith('timm-rla benchmark: error: '), lines
    assert all(word in lines[0] for word in words), lines
    assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(torch.cuda.is_available(), reason='has the device that must be missing')
def test_suite_without_its_device(capsys):
    assert cli.main(['benchmark', '--suite', 'gpu']) == 2
    assert cli.main(['benchmark', '--suite', 'gpu', '--only', 'resnet34']) == 2
    device, only = capsys.readouterr().err.splitlines()
    assert 'cuda' in device and 'resnet34' in only and 'resnet50-train-compiled' in only


class FakeProcess:
    """Answers as a process would that needs no time; `log` tells what was asked of all of them."""
    log = []

    def __init__(self, name, setting):
        self.log.append(name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.append('end')

    def call(self, method, *args):
        self.log.append((method, *args))
        return {'warm_up': 3, 'memory': 2 ** 20, 'time': 0.5}[method]


def test_out_of_memory_names_model_and_batch(monkeypatch):
    class Full(FakeProcess):
        def call(self, method, *args):
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nMore')

    monkeypatch.setattr(measure, 'Process', Full)
    with pytest.raises(UserError, match='^resnet20_cifar, infer, batch 2, 32 px, float32: CUDA out of memory.* More$'):
        measure.measure(TINY, rounds=1, seconds=1e-3)


def test_processes_are_started_anew_and_share_the_rounds(monkeypatch):
    monkeypatch.setattr(measure, 'Process', FakeProcess)
    monkeypatch.setattr(FakeProcess, 'log', [])
    rows = measure.measure(TINY, rounds=7, seconds=1e-3, starts=3)
    start, time, end = [*TINY.models, *2 * [('warm_up', 1e-3)]], ('time', 3), ['end', 'end']
    memory = 2 * [('memory',)]
    assert FakeProcess.log == [*start, *memory, *4 * [time], *end, *start, *4 * [time], *end, *start, *6 * [time], *end]
    assert [row['rounds'] for row in rows] == [7, 7] and rows[1]['ratio'] == 1


def test_a_process_runs_one_model():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with measure.Process(TINY.models[0], TINY) as process:
            assert process.call('warm_up', 1e-3) >= 1
            assert process._executor.submit(torch.get_num_threads).result() == 1
            assert process._executor.submit(os.getpid).result() != os.getpid()
            with pytest.raises(AttributeError, match='no_such_method'):
                process.call('no_such_method')
    finally:
        torch.set_num_threads(threads)
