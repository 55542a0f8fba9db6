"""examples/one_change: each change is one change, to runs that are the same otherwise."""
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version

from timm_rla.common.options import parse
from timm_rla.reproduce.arguments import run_options
from timm_rla.reproduce.plan import load_table, plan_runs
from timm_rla.train.options import model_arguments
from timm_rla.train.setup import create_network, create_optimizer

ROOT = Path(__file__).parents[2]
OLD = pytest.mark.skipif(Version(timm.__version__) < Version('1.0.27'), reason='the example needs timm 1.0.27')


@pytest.fixture(scope='module')
def options():
    """Options of the runs with seed 3, by cell; pytest runs in the folder that holds examples/."""
    table = load_table(str(ROOT / 'examples' / 'one_change.yaml'))
    return {run.cell.key: parse(table.task.parser(), run_options(table.task, run, 10, ['--num-classes', '10']))
            for run in plan_runs(table, [3])}


def start(args):
    """Network that a run with these options starts from."""
    torch.manual_seed(args.seed)
    return create_network(args.model, args.model_kwargs, model_arguments(args),
                          initial_checkpoint=args.initial_checkpoint)


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, ROOT / 'examples' / 'one_change.py', '3'], check=True)


@OLD
def test_starts(written, options):
    usual = start(options['rla']).state_dict()
    changed = {key: start(options[key]).state_dict() for key in ('full_branch', 'forget_bias', 'zero_init_last')}
    for key, state in changed.items():
        differ = {name for name in usual if not torch.equal(usual[name], state[name])}
        norms = {f'layer{stage}.{block}.bn2.weight' for stage in (1, 2, 3) for block in range(3)}
        assert differ == ({'lstm.bias_ih', 'lstm.bias_hh'} if key == 'forget_bias' else norms)
        if key != 'forget_bias':
            value = 2. if key == 'full_branch' else 0.
            assert all((state[name] == value).all() and (usual[name] == 1).all() for name in norms)
    bias = changed['forget_bias']['lstm.bias_ih'] + changed['forget_bias']['lstm.bias_hh']
    usual_bias = usual['lstm.bias_ih'] + usual['lstm.bias_hh']
    assert torch.equal(bias[4:8], torch.ones(4))
    assert torch.equal(bias[:4], usual_bias[:4]) and torch.equal(bias[8:], usual_bias[8:])


@OLD
def test_no_decay(options):
    model = start(options['no_decay'])  # the table has registered it
    same = start(options['rla'])
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in model.state_dict().items())
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, options['no_decay'])
    decay = {names[p]: group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert decay == {name: 0. if name.startswith('lstm.') else 1e-4 for name in names.values()}
    usual = create_optimizer(same, options['rla'])
    assert [group['weight_decay'] for group in usual.param_groups] == [1e-4]


def test_loader(options):
    plain, loader = vars(options['plain']), vars(options['loader'])
    assert {name for name in plain if plain[name] != loader[name]} == {'in_memory'}
    assert all(args.in_memory for key, args in options.items() if key != 'loader')
