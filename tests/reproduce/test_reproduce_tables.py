"""Tables as data: the paper's, those of one's own, and the options of their runs."""
import sys

import pytest
import timm
from helpers import small_table, write_run

import timm_rla_cli as cli
from timm_rla.common.options import parse
from timm_rla.reproduce.arguments import run_options
from timm_rla.reproduce.content import TABLES
from timm_rla.reproduce.plan import Run, load_table, plan_runs
from timm_rla.reproduce.results import Results
from timm_rla.reproduce.tasks import TASKS


@pytest.mark.parametrize('name', TABLES)
def test_tables_name_models_that_exist(name):
    table = load_table(name)
    assert table.cells[0].key == 'plain'
    for cell in table.cells:
        assert timm.is_model(cell.model)
        assert table.plain(cell).key == 'plain'
        task = table.task
        args = parse(task.parser(), run_options(task, Run(cell, 3), None, []))
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
    args = parse(task.parser(), run_options(task, plan_runs(small_table(), [0])[0], epochs, []))
    assert args.epochs == epochs and args.decay_milestones == milestones


@pytest.mark.parametrize('options, images, milestones, warmup', [
    ([], 8, [15_000, 20_000], 250),
    (['--batch-size', '4', '--accumulate', '2'], 8, [15_000, 20_000], 250),
])
def test_schedule_of_detectors_follows_the_length(options, images, milestones, warmup):
    """A quarter of the recipe; its base batch size goes on to scale what there is to the images per iteration."""
    task = TASKS['detection']
    run = plan_runs(load_table('table2-coco', [50], ['coco2017']), [0])[0]
    args = parse(task.parser(), run_options(task, run, 22_500, options))
    assert (args.iterations, args.milestones, args.warmup_iterations) == (22_500, milestones, warmup)
    assert task.length(args) == 22_500 * 16 / (args.batch_size * args.accumulate)


def test_seed_and_cell_in_options():
    run = plan_runs(load_table('table1', [20], ['cifar10'], ['rla']), [3])[1]
    options = run_options(TASKS['classification'], run, None, ['--pretrained-path', '{cell}-seed{seed}.pth.tar'])
    assert options[-2:] == ['--pretrained-path', 'rla-seed3.pth.tar']


def test_arguments_of_the_network_are_added_to_those_of_the_cell():
    """They would take their place: the networks of a column would all be the same."""
    task = TASKS['classification']
    run = plan_runs(small_table(only=['gmp']), [0])[1]
    args = parse(task.parser(), run_options(task, run, None, ['--model-kwargs', 'hidden_dim=8']))
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


OWN = """
title: 'Starts, depth {depths}'
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
    plain, start = (vars(parse(table.task.parser(), run_options(table.task, run, 6, results.options)))
                    for run in plan_runs(table, [4]))
    assert start == {**plain, 'model': 'rla_resnet20_cifar', 'model_kwargs': {'hidden_dim': 8}, 'amp': True,
                     'initial_checkpoint': 'start-20-4.pth.tar', 'decay_milestones': [3, 5], 'opt_betas': [0.8, 0.9],
                     'opt_kwargs': {'maximize': False}}
    assert plain['lr'] == 0.2 and plain['decay_milestones'] == [4, 5]


def test_values_that_begin_with_a_minus(tmp_path):
    (tmp_path / 'starts.yaml').write_text(OWN.replace('amp: true', 'head_init_bias: -0.00001').replace(
        "'start-{depth}-{seed}.pth.tar'", "'-{seed}.pth'"))
    table = load_table(str(tmp_path / 'starts.yaml'))
    args = parse(table.task.parser(), run_options(table.task, Run(table.cells[1], 4), 6, []))
    assert (args.head_init_bias, args.initial_checkpoint) == (-1e-05, '-4.pth')


@pytest.mark.parametrize('options, parameters', [
    ([], 269_722), (['--in-chans', '1'], 269_722 - 2 * 16 * 9), (['--num-classes', '7'], 269_722 - 3 * 65)])
def test_size_is_that_of_the_networks_that_are_trained(tmp_path, options, parameters):
    table = small_table(only=['plain'])
    assert Results(tmp_path / 'out', table, None, options).parameters == {table.cells[0]: parameters}


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


@pytest.mark.parametrize('name, depths', [('own', None), ('mine', [20])])
def test_a_network_of_ones_own(tmp_path, monkeypatch, name, depths):
    """Registered by a module of the current folder, which is not on the path of the console script."""
    (tmp_path / f'{name}_networks.py').write_text(
        'from timm.models import register_model\nfrom timm_rla.models.registry import rla_resnet20_cifar\n\n'
        f'@register_model\ndef {name}_resnet20_cifar(pretrained=False, **kwargs):\n'
        '    return rla_resnet20_cifar(pretrained, **kwargs)\n')
    (tmp_path / 'starts.yaml').write_text(OWN.replace('rla_resnet{depth}', f'{name}_resnet{{depth}}').replace(
        'amp: true', f'device_modules: [{name}_networks]'))
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    table = load_table('starts.yaml', depths)
    assert table.cells[1].model == f'{name}_resnet20_cifar'
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
    (('hidden_dim: 8', 'hidden_dim: 0'), ['Another start: ', 'hidden_dim must be a whole number, at least 1']),
    (('hidden_dim: 8', 'hidden_dim: [8]'), ['Another start: ']),
    (('rla_resnet{depth}_cifar', 'resnet18.bogus'), ['resnet18.bogus', 'bogus']),
    (('amp: true', 'device_modules: [no_such_module]'), ['device_modules no_such_module']),
    (('Another start', "'{depths}'"), ['{depths}', 'only {depth} can']),
    (('Another start', 'a | b'), ["'a | b'"]),
    (('Starts, depth {depths}', '{depth[0]}'), ['{depth[0]}']),
    (('Starts, depth {depths}', '{depth:>999999999}'), ['{depth:>999999999}']),
    (('Starts, depth {depths}', '{depth'), ["'{depth'"]),
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


def test_options_that_the_table_says(tmp_path, capsys):
    (tmp_path / 'starts.yaml').write_text(OWN)
    assert cli.main(['reproduce', str(tmp_path / 'starts.yaml'), '--initial-checkpoint', 'x.pth']) == 2
    assert '--initial-checkpoint x.pth: cannot be given: the table says' in capsys.readouterr().err


def test_unknown_tables_and_depths(tmp_path, capsys):
    assert cli.main(['reproduce', 'table7']) == 2
    assert 'TABLE table7: neither a file nor a table; tables are table1, ' in capsys.readouterr().err
    assert cli.main(['reproduce', 'x' * 300]) == 2
    assert 'too long' in capsys.readouterr().err
    (tmp_path / 'starts.yaml').write_text(OWN.replace('rla_resnet{depth}_cifar', 'rla_resnet20_cifar'))
    assert cli.main(['reproduce', str(tmp_path / 'starts.yaml'), '--depth', '32']) == 2
    assert '--depth 32: rla_resnet20_cifar of this table is of one depth' in capsys.readouterr().err
    assert [cell.depth for cell in load_table(str(tmp_path / 'starts.yaml'), [20]).cells] == [20, 20]
    (tmp_path / 'starts.yaml').write_text(OWN.replace('rla_resnet{depth}_cifar', 'rla_resnet20_cifar').replace(
        'depths: [20]', 'depths: [20, 32]'))
    assert cli.main(['reproduce', str(tmp_path / 'starts.yaml'), '--only', 'start', '--print']) == 2
    assert 'model: rla_resnet20_cifar is of one depth, the table of 20, 32' in capsys.readouterr().err


def test_repeated_parts_of_a_table_run_once():
    table = load_table('table2', [20, 20], ['cifar10', 'cifar10'], ['se', 'se'])
    assert [cell.folder for cell in table.cells] == ['cifar10-20-plain', 'cifar10-20-se']
