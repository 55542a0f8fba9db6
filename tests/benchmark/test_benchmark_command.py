"""`timm-rla benchmark`, from its options to the table."""
from dataclasses import replace

import pytest
import torch
from tiny_benchmark import TINY, rows_of

import timm_rla_cli as cli
from timm_rla.benchmark import measure, results, suites
from timm_rla.benchmark.suites import Setting
from timm_rla.benchmark.variants import SUFFIXES, create
from timm_rla.commands import benchmark as command

OPTIONS = ['--device', 'cpu', '--models', *TINY.models, '--batch-size', '2', '--rounds', '2', '--seconds', '0.001',
           '--starts', '1']


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Settings that options lead to; nothing is measured or written."""
    settings = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        command, 'measure', lambda setting, *args, **kwargs: settings.append(setting) or [dict(hardware='')])
    monkeypatch.setattr(command, 'format_rows', lambda rows: '')
    monkeypatch.setattr(command, 'update', lambda output, rows: None)

    def plan(*argv):
        settings.clear()
        command.main(list(argv))
        return list(settings)

    return plan


def test_options_make_settings(planned):
    found = planned(
        '--device', 'cpu', '--models', 'seresnet18', 'resnet18', '--baseline', 'resnet18', '--batch-size', '4', '8',
        '--precision', 'amp_bfloat16', '--channels-last', '--torchcompile', '--model-kwargs', 'in_chans=3')
    assert [(setting.mode, setting.batch_size) for setting in found] == [
        ('train', 4), ('train', 8), ('infer', 4), ('infer', 8)]
    assert found[0] == Setting(
        ('resnet18+in_chans=3', 'seresnet18+in_chans=3'), 'train', 4, 224, 'cpu', 'amp_bfloat16', True, 'inductor')
    names = {setting.name for setting in planned('--suite', 'cpu', '--only', 'resnet50-train', 'b1-')}
    assert names == {
        'resnet50-train-eager-b32-224px', 'resnet50-train-compiled-b32-224px', 'resnet50-train-eager-b16-128px',
        *(f'resnet{depth}-infer-eager-b1-224px' for depth in (18, 50, 101))}


def test_help_tells_all_forms(capsys):
    with pytest.raises(SystemExit):
        command.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert all(f'MODEL+{suffix}: ' in text for suffix in SUFFIXES)


@pytest.mark.long
def test_end_to_end(tmp_path, capsys, in_this_process):
    path = tmp_path / 'table.csv'
    base, rla = (f'{name}+layers=(1,1,1)' for name in TINY.models)
    options = ['benchmark', *OPTIONS, '--output', str(path)]
    assert cli.main([*options, '--modes', 'train', '--model-kwargs', 'layers=(1,1,1)']) == 0
    assert cli.main([*options, '--modes', 'infer', '--model-kwargs', 'layers=(1,1,1)', '--torchcompile', 'eager']) == 0
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
        2 * [('float32', 'nchw', '')] + 2 * [('float32', 'nchw', 'eager')] + 3 * [('amp_bfloat16', 'nhwc', '')]
    for row in rows[:2]:
        assert float(row['param_count']) == sum(p.numel() for p in create(row['model']).parameters()) / 1e6
    assert all(float(row['ratio']) == float(row['memory_ratio']) == 1
               for row in rows if row['model'] == row['baseline'])
    out = capsys.readouterr().out
    assert out.count('images/s') == 3 and out.count(f'{path}\n') == 3 and out.strip().endswith(str(path))


@pytest.mark.long
def test_with_processes(tmp_path, capsys):
    path = tmp_path / 'table.csv'
    name = 'rla_resnet20_cifar+layers=(1,1,1)+lstm_called+general'
    options = ['--modes', 'train', '--rounds', '1', '--output', str(path)]
    assert cli.main(['benchmark', *OPTIONS, '--models', name, *options]) == 0
    row, = rows_of(path)
    assert row['model'] == name and row['ratio'] == '1.0' and float(row['peak_memory_mib']) > 1
    assert 'MALLOC_MMAP_MAX_=0' in row['allocator'] or not row['allocator'].startswith('glibc')
    log = capsys.readouterr().err
    assert [log.count(f'{doing} {name}') for doing in ('starting', 'preparing', 'memory of', 'warming up')] == \
        [2, 1, 1, 1]


def test_suite_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys, in_this_process):
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
    (['--models', 'rla_resnet20_cifar+fold'], ["'fold'", 'KEY=VALUE', *SUFFIXES]),
    (['--models', *TINY.models, 'resnet20_cifar+general'], ['resnet20_cifar+general', 'layer attention']),
    (['--models', 'rla_resnet20_cifar+triton'], ['rla_resnet20_cifar+triton', '--device cuda']),
    (['--models', 'rla_resnet20_cifar+folded'], ['rla_resnet20_cifar+folded', '--modes infer']),
    (['--models', 'resnet20_cifar', 'resnet20_cifar'], ['resnet20_cifar', 'twice']),
    (['--models', 'resnet18', 'resnet18+fpn'], ['resnet18+fpn', 'detectors and classifiers']),
    (['--model-kwargs', 'hidden_dim'], ['hidden_dim', 'KEY=VALUE']),
    (['--baseline', 'resnet18'], ['--baseline', 'resnet18', *TINY.models]),
    (['--modes', 'test'], ['test', 'train', 'infer']),
    (['--batch-size', '0'], ['--batch-size', '0']),
    (['--batch-size', '999999999'], ['resnet20_cifar', '999999999']),
    (['--img-size', '-1'], ['--img-size', '-1']),
    (['--models', 'resnet18', 'vit_tiny_patch16_224', '--img-size', '8'], ['vit_tiny_patch16_224, image of 8', '224']),
    (['--rounds', '0'], ['--rounds', '0']),
    (['--rounds', 'many'], ['--rounds', 'many', 'int']),
    (['--seconds', 'nan'], ['--seconds', 'nan']),
    (['--threads', '0'], ['--threads', '0']),
    (['--device', 'cuda:99'], ['cuda:99', 'CUDA']),
    (['--device', 'meta'], ['meta', 'no such device here; there are cpu']),
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
def test_bad_input(tmp_path, monkeypatch, capsys, in_this_process, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('a,b\n1,2\n')
    assert cli.main(['benchmark', *OPTIONS, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('[')]  # progress
    assert [line for line in lines if 'error:' in line] == lines[-1:], lines
    assert lines[-1].startswith('timm-rla benchmark: error: '), lines
    assert all(word in lines[-1] for word in words), lines
    assert [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(torch.cuda.is_available(), reason='has the device that must be missing')
def test_suite_without_its_device(capsys):
    assert cli.main(['benchmark', '--suite', 'gpu']) == 2
    assert cli.main(['benchmark', '--suite', 'gpu', '--only', 'resnet34']) == 2
    device, only = capsys.readouterr().err.splitlines()
    assert 'cuda' in device and 'resnet34' in only and 'resnet50-train-compiled' in only
