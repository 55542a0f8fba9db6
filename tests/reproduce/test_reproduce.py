"""The paper's tables: their data, the runs that they need, and the report that is made of them."""
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time

import pytest
import timm
import yaml

import timm_rla_cli as cli
from timm_rla.common.errors import UserError
from timm_rla.common.options import parse
from timm_rla.reproduce.content import TABLES
from timm_rla.reproduce.plan import Run, load_table, plan_runs
from timm_rla.reproduce.plots import plot_curves, plot_differences
from timm_rla.reproduce.report import paired_interval, report_rows, title, write_csv, write_markdown
from timm_rla.reproduce.runs import Results, train_options
from timm_rla.reproduce.studies import markdown_lines, read_studies
from timm_rla.reproduce.tasks import TASKS

HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def write_run(results, run, top1, epochs=2):
    """A finished run, with the accuracy of its last epoch; the one before was better."""
    folder = results.path / run.name
    folder.mkdir(parents=True)
    rows = [f'{epoch},1.0,1.0,{top1 + 5 * (epoch + 1 < epochs)},99.0,0.1\n' for epoch in range(epochs)]
    (folder / 'summary.csv').write_text(HEADER + ''.join(rows))


def small_table(**kwargs):
    return load_table('table1', depths=[20], datasets=['cifar10'], **kwargs)


@pytest.mark.parametrize('name', TABLES)
def test_tables_name_models_that_exist(name):
    table = load_table(name)
    assert table.cells[0].key == 'plain'
    for cell in table.cells:
        assert timm.is_model(cell.model)
        assert table.plain(cell).key == 'plain'
        task = table.task
        args = parse(task.parser(), train_options(task, Run(cell, 3), None, []))
        assert (getattr(args, task.network), args.seed) == (cell.model, 3)
        assert getattr(args, f'{task.network}_kwargs').items() >= cell.model_kwargs.items()
    assert len({run.name for run in plan_runs(table, [0, 1])}) == 2 * len(table.cells)


def test_figures_are_those_of_the_paper():
    cells = {cell.folder: cell for name in TABLES for cell in load_table(name).cells}
    figures = {name: cell.paper for name, cell in cells.items()}
    assert figures['cifar10-20-rla'] == {'error': 7.48} and figures['cifar100-110-se'] == {'error': 27.01}
    assert figures['imagenet-50-rla'] == {'error': 23.83} and figures['cifar10-56-m8'] == {'error': 6.35}
    assert figures['coco2014-50-plain'] == {'map_50': 47.4, 'map': 27.7}
    assert figures['coco2014-101-rla'] == {'map_50': 51.2, 'map': 30.7}
    assert figures['coco2014-50-se'] == {} and figures['bccd-18-rla'] == {}


@pytest.mark.parametrize('epochs, milestones', [(160, [81, 121]), (80, [41, 61]), (30, [16, 23])])
def test_schedule_follows_the_length(epochs, milestones):
    task = TASKS['classification']
    args = parse(task.parser(), train_options(task, plan_runs(small_table(), [0])[0], epochs, []))
    assert args.epochs == epochs and args.decay_milestones == milestones


@pytest.mark.parametrize('options, images, milestones, warmup', [
    ([], 8, [15_000, 20_000], 250),
    (['--batch-size', '4', '--accumulate', '2'], 8, [15_000, 20_000], 250),
])
def test_schedule_of_detectors_follows_the_length(options, images, milestones, warmup):
    """A quarter of the recipe; its base batch size goes on to scale what there is to the images per iteration."""
    task = TASKS['detection']
    run = plan_runs(load_table('table2-coco', [50], ['coco2017']), [0])[0]
    args = parse(task.parser(), train_options(task, run, 22_500, options))
    assert (args.iterations, args.milestones, args.warmup_iterations) == (22_500, milestones, warmup)
    assert task.length(args) == 22_500 * 16 / (args.batch_size * args.accumulate)


def test_seed_and_cell_in_options():
    run = plan_runs(load_table('table1', [20], ['cifar10'], ['rla']), [3])[1]
    options = train_options(TASKS['classification'], run, None, ['--pretrained-path', '{cell}-seed{seed}.pth.tar'])
    assert options[-2:] == ['--pretrained-path', 'rla-seed3.pth.tar']


def test_arguments_of_the_network_are_added_to_those_of_the_cell():
    """They would take their place: the networks of a column would all be the same."""
    task = TASKS['classification']
    run = plan_runs(small_table(only=['gmp']), [0])[1]
    args = parse(task.parser(), train_options(task, run, None, ['--model-kwargs', 'hidden_dim=8']))
    assert args.model_kwargs == dict(context='gmp', hidden_dim=8)


@pytest.mark.parametrize('options, epochs', [
    ([], 160),
    (['--cooldown-epochs', '3'], 160),  # of this schedule timm knows no cooldown
    (['--warmup-prefix', '--warmup-epochs', '5'], 165),
    (['--sched', 'cosine', '--cooldown-epochs', '3', '--lr-cycle-limit', '2'], 323),
    (['--sched', 'cosine', '--sched-on-updates', '--warmup-epochs', '4', '--warmup-prefix'], 164),
])
def test_end_of_a_run_is_that_of_its_schedule(tmp_path, options, epochs):
    assert set(Results(tmp_path, small_table(), None, options).ends.values()) == {epochs}


def test_seeds_come_before_cells():
    runs = plan_runs(small_table(only=['rla']), [0, 1])
    assert [(run.cell.key, run.seed) for run in runs] == [('plain', 0), ('rla', 0), ('plain', 1), ('rla', 1)]


def test_interval_against_the_formula():
    differences = [-0.4, 0.1, -0.3, -0.2]
    lower, upper = paired_interval(differences)
    half = 3.182446 * statistics.stdev(differences) / math.sqrt(4)  # t of 3 degrees of freedom, from a table
    assert (lower + upper) / 2 == pytest.approx(-0.2) and (upper - lower) / 2 == pytest.approx(half, rel=1e-5)
    assert paired_interval([1.]) is None


def test_report(tmp_path):
    table = small_table(only=['rla', 'se'])
    results = Results(tmp_path / 'out', table, 2, [])
    plain, rla, _ = sorted(table.cells, key=lambda cell: ['plain', 'rla', 'se'].index(cell.key))
    for seed, (first, second) in enumerate(zip((90., 91., 92.), (91., 91.5, 93.))):
        write_run(results, Run(plain, seed), first)
        write_run(results, Run(rla, seed), second)
    write_run(results, Run(rla, 3), 50., epochs=1)  # not finished
    rows = {row.cell.key: row for row in report_rows(results, [0, 1, 2, 3])}
    assert rows['rla'].mean == pytest.approx(100 - statistics.mean((91., 91.5, 93.)))
    assert rows['rla'].std == pytest.approx(statistics.stdev((91., 91.5, 93.)))
    assert rows['rla'].difference == pytest.approx(-(1 + 0.5 + 1) / 3) and rows['rla'].pairs == 3
    assert rows['se'].mean is None and rows['plain'].difference is None

    text = write_markdown(tmp_path / 'report.md', 'A title', list(rows.values()), 'epoch').read_text()
    assert '| RLA-20 |' in text and '8.17 ± 1.04' in text and 'missing' in text and '3 of 4' in text
    with open(write_csv(tmp_path / 'report.csv', list(rows.values()))) as f:
        lines = list(csv.DictReader(f))
    assert [float(line['value']) for line in lines if line['cell'] == 'rla'] == [9., 8.5, 7.]


@pytest.mark.parametrize('rows, values, said', [
    (['0,1.0,1.0,80.0,99.0,0.1', '1,nan,1.0,90.0,99.0,0.1'], {0: 10.}, ''),  # its loss was nan: that is its result
    (['0,1.0,1.0,-500.0,99.0,0.1', '1,1.0,1.0,90.0,99.0,0.1'], {0: 10.}, 'not in the curves'),
    (['0,1.0,,,,0.1', '1,1.0,1.0,90.0,99.0,0.1'], {0: 10.}, 'not in the curves'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,nan,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,-500.0,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,,1.0,90.0,99.0,0.1'], {}, 'the run is left out'),
])
def test_damaged_rows_are_named_and_left_out(tmp_path, caplog, rows, values, said):
    results = Results(tmp_path / 'out', small_table(only=['plain']), 2, [])
    plain, = results.table.cells
    write_run(results, Run(plain, 1), 91.)
    write_run(results, Run(plain, 0), 91.)
    file = results.path / Run(plain, 0).name / 'summary.csv'
    file.write_text(HEADER + '\n'.join(rows) + '\n')
    found = report_rows(results, [0, 1])
    assert found[0].values == pytest.approx({1: 9., **values})
    assert (said in caplog.text and str(file) in caplog.text) if said else not caplog.text
    assert plot_curves(results, found, '', tmp_path / 'a.png').stat().st_size > 0


def test_report_of_detectors(tmp_path):
    """Two metrics, each with its own table; larger is better, and a run is finished with its last iteration."""
    results = Results(tmp_path / 'out', load_table('bccd', only=['rla']), 40, [])
    plain, rla = results.table.cells
    for cell, seed, last, value in [(plain, 0, 40, .5), (plain, 1, 40, .6), (rla, 0, 40, .53), (rla, 1, 40, .61),
                                    (rla, 2, 39, .9)]:
        folder = results.path / Run(cell, seed).name
        folder.mkdir(parents=True)
        (folder / 'summary.csv').write_text(
            f'epoch,train_loss,eval_map,eval_map_50,lr\n20,1.0,.99,.99,.1\n{last},1.0,{value},{value + .2},.1\n')
    rows = report_rows(results, [0, 1, 2])
    assert [(row.metric.key, row.cell.key) for row in rows] == [
        ('map', 'plain'), ('map', 'rla'), ('map_50', 'plain'), ('map_50', 'rla')]
    assert rows[1].values == pytest.approx({0: 53., 1: 61.}) and rows[3].values == pytest.approx({0: 73., 1: 81.})
    assert rows[1].difference == pytest.approx(2.) and rows[1].pairs == 2
    assert rows[0].params < rows[1].params < 1.1 * rows[0].params
    text = write_markdown(tmp_path / 'report.md', title(results, ''), rows, 'iteration').read_text()
    assert '40 iterations instead of 800' in text and 'above 0 is better' in text
    assert text.index('mAP@[.5,.95] in percent after the last iteration') < text.index('mAP@.5 in percent')
    assert plot_curves(results, rows, '', tmp_path / 'a.png').stat().st_size > 0
    assert plot_differences(rows, 'mAP', '', tmp_path / 'b.png').stat().st_size > 0


def test_studies(tmp_path):
    """Figures of two seeds, by hand; error is what accuracy loses."""
    table = small_table(only=['rla'])
    results = Results(tmp_path, table, 2, [])
    rla = next(cell for cell in table.cells if cell.key == 'rla')
    for seed, (loss, mean) in enumerate([(-0.5, 0.2), (-0.3, 0.4)]):
        write_run(results, Run(rla, seed), 90.)
        (results.path / Run(rla, seed).name / 'frozen.json').write_text(json.dumps(dict(
            means=dict(difference=loss), class_means=dict(difference=0.1),
            blocks={'layer1.0': dict(mean=mean, std=0.01, class_std=0.005)},
            held={'layer1.0': dict(difference=loss / 2)})))
    studied = read_studies(results, report_rows(results, [0, 1]))
    assert [entry.cell for entry in studied] == [rla]
    text = '\n'.join(markdown_lines(studied))
    half = 12.7062 * 0.1  # t of 1 degree of freedom, standard error of -0.5 and -0.3
    assert f'| RLA-20 | 2 | +0.40 | {0.4 - half:+.2f} to {0.4 + half:+.2f} | -0.10 | -0.10 to -0.10 |' in text
    assert '| RLA-20 | `layer1.0` | 0.3000 | 0.0100 | 0.0050 | +0.200 |' in text
    assert markdown_lines([]) == []


@pytest.mark.parametrize('change, message', [
    (lambda study: [study], 'indices'),
    (lambda study: dict(study, blocks=[]), 'items'),
    (lambda study: dict(study, blocks={}), 'no blocks'),
    (lambda study: dict(study, blocks={'layer1.0': dict(mean=.5)}), 'std'),
    (lambda study: dict(study, blocks={'layer1.0': 3}), 'frozen.json'),
    (lambda study: dict(study, held={}), 'layer1.0'),
    (lambda study: dict(study, means=dict(difference='x')), "difference of means is 'x'"),
    (lambda study: dict(study, means=dict(difference=10 ** 400)), 'frozen.json'),
    (lambda study: dict(study, epoch='last'), "epoch is 'last'"),
])
def test_a_damaged_study_is_named(tmp_path, change, message):
    results = Results(tmp_path, small_table(only=['rla']), 2, [])
    run = Run(results.table.cells[1], 0)
    write_run(results, run, 90.)
    file = results.path / run.name / 'frozen.json'
    study = dict(means=dict(difference=.1), class_means=dict(difference=.1),
                 blocks={'layer1.0': dict(mean=.5, std=.1, class_std=.1)}, held={'layer1.0': dict(difference=.1)})
    rows = report_rows(results, [0])
    for whole in study, dict(study, epoch=1):
        file.write_text(json.dumps(whole))
        assert read_studies(results, rows)[0].studies == [whole]
    file.write_text(json.dumps(dict(study, epoch=0)))  # the run has gone on since
    assert read_studies(results, rows) == []
    file.write_text(json.dumps(change(study)))
    with pytest.raises(UserError, match=message) as error:
        read_studies(results, rows)
    assert str(file) in str(error.value)


def test_one_seed_has_no_interval(tmp_path):
    table = small_table(only=['rla'])
    results = Results(tmp_path, table, 2, [])
    for cell in table.cells:
        write_run(results, Run(cell, 0), 90.)
    row = report_rows(results, [0])[-1]
    text = write_markdown(tmp_path / 'r.md', '', [row], 'epoch').read_text()
    assert row.interval is None and 'needs two seeds' in text


COMMON = ['--depth', '20', '--datasets', 'cifar10', '--only', 'rla', '--dataset', '', '--device', 'cpu', '--img-size',
          '8', '--batch-size', '16', '--in-memory', '--workers', '0', '--log-interval', '1000']


@pytest.mark.long
def test_command_end_to_end(image_folder, tmp_path, capsys, monkeypatch):
    """Runs are made, skipped when they are there, gone on with when they are not whole, and reported."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    command = ['reproduce', 'table1', *COMMON, '--data-dir', str(image_folder), '--output', str(tmp_path / 'out'),
               '--epochs', '2', '--seeds', '0', '--data-note', 'digits']
    assert cli.main([*command, '--report']) == 2 and 'nothing has been run' in capsys.readouterr().err
    assert cli.main([*command, '--print']) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 and all('--resume auto' in line for line in printed)
    assert shlex.split(printed[0])[1:4] == ['-m', 'timm_rla', 'train']
    assert cli.main(shlex.split(printed[0])[3:]) == 0  # as another machine may run it
    assert (tmp_path / 'out' / 'cifar10-20-plain-seed0' / 'last.pth.tar').is_file()
    assert cli.main([*command, '--print']) == 0
    assert capsys.readouterr().out.strip().splitlines() == printed[1:]
    assert cli.main([*command, '--report']) == 0
    assert '| ResNet-20 |' in (tmp_path / 'out' / 'report.md').read_text()
    capsys.readouterr()

    assert cli.main([*command, '--jobs', '2']) == 0
    out = capsys.readouterr().out
    assert '1 of 2 runs are finished, 1 to go' in out and '[1/1]' in out and 'Top-1 error' in out
    for name in ('report.md', 'report.csv', 'curves.png', 'differences.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 0
    assert '2 epochs instead of 160' in (tmp_path / 'out' / 'report.md').read_text()
    assert 'digits' in (tmp_path / 'out' / 'report.md').read_text()

    folder = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    before = (folder / 'last.pth.tar').stat().st_mtime_ns
    assert cli.main(command) == 0
    assert '2 of 2 runs are finished, 0 to go' in capsys.readouterr().out
    assert (folder / 'last.pth.tar').stat().st_mtime_ns == before
    (folder / 'summary.csv').write_bytes(b'')  # as a full disk or a crash may leave it
    assert cli.main([*command, '--print']) == 0
    again, = capsys.readouterr().out.strip().splitlines()
    assert again == printed[0] and cli.main(shlex.split(again)[3:]) == 0
    capsys.readouterr()
    assert cli.main([*command, '--print']) == 0 and not capsys.readouterr().out

    checkpoint = tmp_path / 'out' / 'cifar10-20-rla-seed0' / 'last.pth.tar'
    freeze = ['freeze', str(checkpoint), '--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    assert cli.main([*freeze, '--study']) == 0
    assert cli.main([*command, '--report']) == 0
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert '## With attention, and with its means' in text and '| RLA-20 | `layer3.2` |' in text
    assert (tmp_path / 'out' / 'attentions.png').stat().st_size > 0
    report = tmp_path / 'out' / 'report.md'
    (tmp_path / 'out' / 'report.csv').unlink(), (tmp_path / 'out' / 'report.csv').mkdir()
    report.write_text('as before')
    assert cli.main([*command, '--report']) == 2  # all of it or nothing
    assert 'report.csv: is a folder' in capsys.readouterr().err and report.read_text() == 'as before'


@pytest.mark.parametrize('options, words', [
    (['--only', 'rlo'], ['rlo', 'rla_vector']),
    (['--datasets', 'mnist'], ['mnist', 'cifar10']),
    (['--epochs', '0'], ['--epochs 0']),
    (['--jobs', '0'], ['--jobs 0']),
    (['--iterations', '9'], ['--iterations', 'table1', '--epochs']),
    (['--lernrate', '1'], ['--lernrate']),
    (['--depth', '20', '21'], ['--depth 21', '20, 32, 44, 56, 110']),
    (['--depth', '0'], ['--depth 0', '110']),
    (['--model', 'resnet18'], ['--model resnet18', '--only']),
    (['--seed=5'], ['--seed 5', '--seeds']),
    (['--seeds', '0', '-1'], ['--seeds -1', 'from 0']),
    (['--experiment', 'x'], ['--experiment x']),
    (['--resume', 'foo'], ['--resume foo']),
    (['-c', 'cifar100'], ['--config cifar100']),
    (['--only', 'gmp', '--model-kwargs', 'context=gap'], ['--model-kwargs context=gap', 'context=gmp']),
    (['--sched', 'foo'], ['--sched foo', 'multistep']),
    (['--report', '--print'], ['--print --report']),
    (['--report', '--jobs', '2'], ['--report --jobs']),
    (['--print', '--devices', 'cpu'], ['--print --devices']),
    (['--report', '--output', 'nowhere'], ['--output nowhere', 'nothing has been run']),
    (['--report', '--output', __file__], ['test_reproduce.py: is a file']),
], ids=str)
def test_bad_input(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', 'table1', *options]) == 2
    line = capsys.readouterr().err.strip()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


OWN = """
title: 'Starts, depth {depth}'
depths: [20]
datasets: [cifar10]
cells:
  plain: {name: 'ResNet-{depth}', model: 'resnet{depth}_cifar'}
  start:
    name: Another start
    model: 'rla_resnet{depth}_cifar'
    model_kwargs: {hidden_dim: 8}
    options: {initial_checkpoint: 'start-{depth}-{seed}.pth.tar', amp: true, decay_milestones: [3, 5],
              opt_betas: [0.8, 0.9], opt_kwargs: {maximize: false}}
    paper: {20: {cifar10: 9.0, params: 0.3}}
"""


def test_a_table_of_ones_own(tmp_path):
    (tmp_path / 'starts.yaml').write_text(OWN)
    table = load_table(str(tmp_path / 'starts.yaml'))
    assert (table.name, table.title, [cell.name for cell in table.cells]) == (
        'starts', 'Starts, depth 20', ['ResNet-20', 'Another start'])
    assert (table.cells[1].paper, table.cells[1].paper_params) == ({'error': 9.0}, 0.3)
    results = Results(tmp_path / 'out', table, 6, ['--lr', '0.2'])
    plain, start = (vars(parse(table.task.parser(), train_options(table.task, run, 6, results.options)))
                    for run in plan_runs(table, [4]))
    assert start == {**plain, 'model': 'rla_resnet20_cifar', 'model_kwargs': {'hidden_dim': 8}, 'amp': True,
                     'initial_checkpoint': 'start-20-4.pth.tar', 'decay_milestones': [3, 5], 'opt_betas': [0.8, 0.9],
                     'opt_kwargs': {'maximize': False}}
    assert plain['lr'] == 0.2 and plain['decay_milestones'] == [4, 5]


def test_a_table_of_ones_own_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'starts.yaml').write_text(OWN)
    table = load_table('starts.yaml')
    results = Results(tmp_path / 'output' / 'starts', table, 2, [])
    results.record()
    for run, top1 in zip(plan_runs(table, [0, 1]), (90., 91., 92., 92.5)):
        write_run(results, run, top1)
    assert cli.main(['reproduce', 'starts.yaml', '--epochs', '2', '--seeds', '0', '1', '--report']) == 0
    assert '| cifar10 | Another start | 9.00 | 8.25' in (results.path / 'report.md').read_text()


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    """Registered by a module of the current folder, which is not on the path of the console script."""
    (tmp_path / 'own_networks.py').write_text(
        'from timm.models import register_model\nfrom timm_rla.models.registry import rla_resnet20_cifar\n\n'
        '@register_model\ndef own_resnet20_cifar(pretrained=False, **kwargs):\n'
        '    return rla_resnet20_cifar(pretrained, **kwargs)\n')
    (tmp_path / 'starts.yaml').write_text(OWN.replace('rla_resnet{depth}', 'own_resnet{depth}').replace(
        'amp: true', 'device_modules: [own_networks]'))
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    table = load_table('starts.yaml')
    assert table.cells[1].model == 'own_resnet20_cifar'
    extra = 4 * 8 * (32 + 8 + 2) + 9 * (8 * 8 + 8 + 8 + 1)  # LSTM and nine heads with M = 8, N = 32, r = 1
    assert Results(tmp_path / 'out', table, 6, []).parameters[table.cells[1]] == 269_722 + extra


@pytest.mark.parametrize('change, words', [
    (('plain:', 'base:'), ['none is named plain']),
    (('title:', 'titel:'), ['titel: no such key', 'title']),
    (('depths: [20]\n', ''), ['depths: missing']),
    (('depths: [20]', 'depths: [0]'), ['depths: 0']),
    (('depths: [20]', 'depths: 20'), ['depths: 20']),
    (('[cifar10]', '[cifar11]'), ['cifar11', 'cifar10, cifar100']),
    (('start:', 'a/b:'), ['a/b']),
    (('Another start', "'{size}'"), ['{size}', 'depth']),
    (('rla_resnet{depth}_cifar', 'rla_resnet{depth}_cifer'), ['rla_resnet20_cifer: no such model', 'did you mean']),
    (('amp: true', 'amp: false'), ['start: options: amp: False']),
    (('amp: true', 'amp: 1'), ['options: amp: 1 is not of type bool']),
    (('amp: true', 'dr: 0.2'), ['options: dr: no such option']),
    (('amp: true', 'help: true'), ['options: help: no such option']),
    (('amp: true', 'model-kwargs: {hidden_dim: 16}'), ['model-kwargs: no such option']),
    (('amp: true', '5: 1'), ['options: 5 is not a name']),
    (('hidden_dim: 8', '5: 8'), ['model_kwargs: 5 is not a name']),
    (('hidden_dim: 8', 'hiden_dim: 8'), ['hiden_dim', 'hidden_dim']),
    (('hidden_dim: 8', 'hidden_dim: 0'), ['hidden_dim must be at least 1']),
    (('rla_resnet{depth}_cifar', 'resnet18.bogus'), ['resnet18.bogus', 'bogus']),
    (('amp: true', 'device_modules: [no_such_module]'), ['device_modules no_such_module']),
    (('Another start', "'{depths}'"), ['{depths}', 'only {depth} can']),
    (('Another start', 'a | b'), ["'a | b'"]),
    (('Starts, depth {depth}', '{depth[0]}'), ['{depth[0]}']),
    (('Starts, depth {depth}', '{depth:>999999999}'), ['{depth:>999999999}']),
    (('Starts, depth {depth}', '{depth'), ["'{depth'"]),
    (('params: 0.3', 'params: {a: 1}'), ["{'a': 1} is not a number"]),
    (('params: 0.3', 'params: .nan'), ['nan is not a number']),
    (('cifar10: 9.0', 'cifar11: 9.0'), ["'cifar11'", 'cifar10, params']),
    (('cifar10: 9.0', 'cifar10: {map: 9.0}'), ["'map'", 'error']),
    (('{20: {', "{'20': {"), ["'20'"]),
    (('[cifar10]', '[coco2014]'), ["'coco2014'", 'imagenet']),
    (('amp: true', 'lernrate: 1'), ['options: lernrate', 'no such option']),
    (('amp: true', 'seed: 1'), ['options: seed']),
    (('amp: true', 'epochs: 1'), ['options: epochs']),
    (('amp: true', 'lr: 1'), ['--lr 0.2', 'Another start']),
    (('amp: true', 'epoch_repeats: [1]'), ['epoch_repeats: [1] is not of type float']),
    (('amp: true', 'epoch_repeats: x'), ['--epoch-repeats', "'x'"]),
    (('cifar10: 9.0', 'cifar10: x'), ["'x'"]),
    (('{hidden_dim: 8}', '[8]'), ['model_kwargs: [8]']),
    (('model_kwargs', 'kwargs'), ['start: kwargs: no such key', 'model_kwargs']),
    (('cells:', 'x: 1\ncells:'), ['x: no such key']),
    (('cells:', 'cells: []\ny:'), ['y: no such key']),
], ids=str)
def test_a_table_of_ones_own_with_faults(tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    assert OWN.count(change[0]) == 1
    (tmp_path / 'starts.yaml').write_text(OWN.replace(*change))
    assert cli.main(['reproduce', 'starts.yaml', '--lr', '0.2']) == 2
    line = capsys.readouterr().err.strip()
    assert all(word in line for word in words) and 'Traceback' not in line, line
    assert [path.name for path in tmp_path.iterdir()] == ['starts.yaml']


def test_unknown_tables_and_depths(tmp_path, capsys):
    assert cli.main(['reproduce', 'table7']) == 2
    assert 'TABLE table7: neither a file nor a table; tables are table1, ' in capsys.readouterr().err
    assert cli.main(['reproduce', 'x' * 300]) == 2
    assert 'too long' in capsys.readouterr().err
    (tmp_path / 'starts.yaml').write_text(OWN.replace('rla_resnet{depth}_cifar', 'rla_resnet20_cifar'))
    assert cli.main(['reproduce', str(tmp_path / 'starts.yaml'), '--depth', '32']) == 2
    assert '--depth 32: rla_resnet20_cifar of this table is of one depth' in capsys.readouterr().err


def test_repeated_parts_of_a_table_run_once():
    table = load_table('table2', [20, 20], ['cifar10', 'cifar10'], ['se', 'se'])
    assert [cell.folder for cell in table.cells] == ['cifar10-20-plain', 'cifar10-20-se']


def test_folder_of_another_table(tmp_path, capsys):
    """It is refused, unless it holds no run yet."""
    folder = tmp_path / 'out'
    folder.mkdir()
    settings = folder / 'table.yaml'
    settings.write_text(yaml.safe_dump(dict(table='table3', epochs=None, options=[])))
    (folder / 'cifar10-56-plain-seed0').mkdir()
    for further in ([], ['--print'], ['--report']):
        assert cli.main(['reproduce', 'table1', '--output', str(folder), *further]) == 2
        assert 'table table3, not table1' in capsys.readouterr().err
    (folder / 'cifar10-56-plain-seed0').rmdir()
    assert cli.main(['reproduce', 'table1', '--output', str(folder), '--print']) == 0
    assert yaml.safe_load(settings.read_text())['table'] == 'table1'
    settings.unlink()
    (folder / 'mine.txt').write_text('mine')
    assert cli.main(['reproduce', 'table1', '--output', str(folder)]) == 2
    assert 'neither empty nor' in capsys.readouterr().err and (folder / 'mine.txt').read_text() == 'mine'


def test_a_run_with_other_options(tmp_path, capsys):
    """Its command was printed for the folder before another one, and has run since."""
    command = ['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--only', 'plain', '--seeds', '0',
               '--output', str(tmp_path / 'out')]
    assert cli.main([*command, '--lr', '0.5', '--print']) == 0
    line = shlex.split(capsys.readouterr().out)[4:]
    assert cli.main([*command, '--lr', '0.25', '--print']) == 0
    run = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    run.mkdir()
    args = vars(parse(TASKS['classification'].parser(), line))
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(args, device='cuda', workers=77)))
    for further in ([], ['--print'], ['--report']):
        assert cli.main([*command, '--lr', '0.25', *further]) == 2
        assert 'cifar10-20-plain-seed0 is a run with lr 0.5, not 0.25' in capsys.readouterr().err
    (tmp_path / 'out' / 'table.yaml').write_text(yaml.safe_dump(dict(table='table1', epochs=None,
                                                                     options=['--lr', '0.5'])))
    assert cli.main([*command, '--lr', '0.5', '--report']) == 0


def test_two_harnesses_at_once(tmp_path, capsys):
    results = Results(tmp_path / 'out', small_table(), None, [])
    with results.locked():
        assert cli.main(['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--output',
                         str(tmp_path / 'out')]) == 2
    assert 'another process runs this table' in capsys.readouterr().err


@pytest.mark.long
def test_a_failed_run_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ['--data-dir', 'nowhere', '--output', 'out', '--seeds', '0', '--jobs', '2']
    command = ['reproduce', 'table1', *COMMON, *options]
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert 'nowhere' in captured.out and '2 runs failed' in captured.err
    assert 'missing' in (tmp_path / 'out' / 'report.md').read_text()


@pytest.mark.long
def test_asked_to_stop(image_folder, tmp_path):
    """The signal reaches the runs, which keep where they are; nothing is left behind, and the command goes on."""
    command = [sys.executable, '-m', 'timm_rla', 'reproduce', 'table1', *COMMON, '--data-dir', str(image_folder),
               '--output', str(tmp_path / 'out'), '--epochs', '300', '--seeds', '0']
    process = subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1'), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    run = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    deadline = time.monotonic() + 100
    while not (run / 'last.pth.tar').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and 'the same command goes on' in errors and 'Traceback' not in errors
    assert len(list(run.glob('recovery-*.pth.tar'))) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
