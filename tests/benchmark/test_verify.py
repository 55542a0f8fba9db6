"""No benchmark of a wrong op."""
from dataclasses import replace

import pytest
import torch
from tiny_benchmark import TINY, InThisProcess

import timm_rla_cli as cli
from timm_rla.benchmark import verify, workload
from timm_rla.benchmark.precision import PRECISIONS
from timm_rla.common.errors import UserError
from timm_rla.ops.gated_norm import cpu, fused, set_form
from timm_rla.ops.lstm import CellWeights, FoldedCell

RIGHT = {name: getattr(owner, name) for owner, name in (
    (cpu, 'statistics'), (cpu, 'apply'), (cpu, 'reduce'), (cpu, 'combine'), (fused, '_gated'), (fused, '_normalize'),
    (CellWeights, 'batched_gates'), (CellWeights, 'gates'), (FoldedCell, 'forward'))}
SHAPES = verify.SHAPES
TRAIN = replace(TINY, mode='train', batch_size=4)


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    monkeypatch.setattr(verify, 'SHAPES', {(8, 6, 6): False, (5, 7, 3): True})


@pytest.fixture
def found(monkeypatch):
    """All deviations."""
    deviations = []
    deviation = verify._deviation
    monkeypatch.setattr(verify, '_deviation', lambda *args: deviations.append(deviation(*args)) or deviations[-1])
    return deviations


STEPS = 2 * 4  # values of the two LSTM steps


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('mode', ['train', 'infer'])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_all_precisions_pass(precision, mode, channels_last, found):
    setting = replace(TRAIN, mode=mode, precision=precision, channels_last=channels_last)
    verify.verify(setting)
    gated = 2 * (precision == 'float32' and not channels_last)  # eager mode on a CPU has no other fused form
    steps, each = (STEPS + 6 + 3, 3 + 5) if mode == 'train' else (STEPS, 3)
    assert len(found) == gated * each + steps
    assert max(found) < verify.TOLERANCES[PRECISIONS[precision].features] / 2


@pytest.mark.parametrize('precision', ['float32', 'float16', 'amp_bfloat16'])
def test_compiled_ops_pass(precision, found):
    verify.verify(replace(TRAIN, precision=precision, channels_last=True, torchcompile='eager'))
    assert len(found) == 2 * (3 + 5) + STEPS + 6 + 3
    assert max(found) < verify.TOLERANCES[PRECISIONS[precision].features] / 2


def test_a_single_image(found):
    verify.verify(replace(TRAIN, batch_size=1))
    assert found


def test_large_maps_pass(monkeypatch, found):
    monkeypatch.setattr(verify, 'SHAPES', SHAPES)
    for mode in 'train', 'infer':
        verify.verify(replace(TRAIN, mode=mode))
    assert max(found) < verify.TOLERANCES[torch.float32] / 2


def wrong_statistics(z):
    mean, var = RIGHT['statistics'](z)
    return mean, var * 1.01


def wrong_apply(z, mean, scale, shift, shortcut):
    return RIGHT['apply'](z, mean, scale, shift * 1.01, shortcut)


def wrong_reduce(grad, out, z, mean):
    g, sum_g, sum_gz = RIGHT['reduce'](grad, out, z, mean)
    return g, sum_g, sum_gz * 1.001


def wrong_combine(g, z, mean, k1, k2, k3):
    return RIGHT['combine'](g, z, mean, k1, k2, torch.zeros_like(k3))


def nan_in_one_place(z, mean, scale, shift, shortcut):
    out = RIGHT['apply'](z, mean, scale, shift, shortcut)
    out[0, 0, 0, 0] = float('nan')
    return out


def wrong_formula(z, mean, scale, pooled, gate):
    return RIGHT['_gated'](z, mean, scale, pooled.detach(), gate)


def without_gradient(z, weight, bias, eps):
    return RIGHT['_normalize'](z, weight, bias.detach(), eps)


def swapped_gates(self, x, state):
    i, f, g, o = RIGHT['batched_gates'](self, x, state)
    return f, i, g, o


def no_recurrence(self, x, state):
    return RIGHT['gates'](self, x, None)


def forgetful(self, gates, state=None):
    return RIGHT['forward'](self, gates, None)


COMPILED = dict(torchcompile='eager')


@pytest.mark.parametrize('owner, name, wrong, changes, words', [
    (cpu, 'statistics', wrong_statistics, {}, ['gated norm', 'float32 on cpu, eager', 'mean pooling', '2e-05']),
    (cpu, 'apply', wrong_apply, {}, ['gated norm', ' output']),
    (cpu, 'apply', nan_in_one_place, {}, ['gated norm', ' output', 'nan']),
    (cpu, 'reduce', wrong_reduce, {}, ['gated norm', 'gradient of']),
    (cpu, 'combine', wrong_combine, {}, ['gated norm', 'gradient of z']),
    (fused, '_gated', wrong_formula, COMPILED, ['gated norm', 'compiled', 'gradient of']),
    (fused, '_gated', wrong_formula, dict(precision='amp_bfloat16', **COMPILED), ['amp_bfloat16', 'gradient', '0.06']),
    (fused, '_normalize', without_gradient, COMPILED, ['gated norm', 'gradient of bias', 'inf']),
    (CellWeights, 'batched_gates', swapped_gates, {}, ['LSTM step', 'h_1']),
    (CellWeights, 'batched_gates', swapped_gates, dict(precision='float16'), ['LSTM step', 'h_1', '0.01']),
    (CellWeights, 'gates', no_recurrence, dict(batch_size=1), ['LSTM step', 'h_2']),
    (CellWeights, 'gates', no_recurrence, COMPILED, ['LSTM step', 'h_2', 'compiled']),
    (FoldedCell, 'forward', forgetful, {}, ['folded LSTM step', 'h_2']),
    (FoldedCell, 'forward', forgetful, dict(mode='infer'), ['folded LSTM step', 'h_2']),
], ids=lambda value: getattr(value, '__name__', None))
def test_a_wrong_op_is_refused(monkeypatch, owner, name, wrong, changes, words):
    setting = replace(TRAIN, **changes)
    verify.verify(setting)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(UserError) as error:
        verify.verify(setting)
    assert all(word in str(error.value) for word in [*words, 'tolerance']), str(error.value)


def test_ops_of_a_model_that_compiles_its_tails(monkeypatch):
    """The setting is eager; the op is not."""
    monkeypatch.setattr(fused, '_gated', wrong_formula)
    verify.verify(TRAIN)
    with pytest.raises(UserError, match='gated norm, float32 on cpu, compiled: gradient of'):
        verify.verify(TRAIN, backend='eager')


def test_a_form_that_is_switched_off_is_not_verified(monkeypatch):
    monkeypatch.setattr(cpu, 'apply', wrong_apply)
    set_form('off')
    verify.verify(TRAIN)


@pytest.mark.parametrize('mode', ['train', 'infer'])
def test_nothing_is_measured_or_written(tmp_path, monkeypatch, capsys, in_this_process, mode):
    """Not even in a process that runs the plain network."""
    monkeypatch.setattr(CellWeights, 'batched_gates', swapped_gates)
    monkeypatch.setattr(workload.Workload, 'time', lambda *args: pytest.fail('timed'))
    monkeypatch.setattr(workload.Workload, 'warm_up', lambda *args: pytest.fail('warmed up'))
    output = tmp_path / 'table.csv'
    options = ['--device', 'cpu', '--batch-size', '2', '--modes', mode, '--output', str(output)]
    assert cli.main(['benchmark', '--models', *TINY.models, *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('timm-rla benchmark: error: LSTM step, float32 on cpu, eager: h_1 deviates')
    assert 'tolerance is 2e-05; nothing was measured' in last and not output.exists()


def test_plain_networks_have_nothing_to_verify(monkeypatch, in_this_process):
    monkeypatch.setattr(CellWeights, 'batched_gates', swapped_gates)
    InThisProcess(TINY.models[0], TINY).ready()
    with pytest.raises(UserError):
        InThisProcess(TINY.models[1], TINY).ready()


def test_compiling_for_the_check_leaves_nothing_behind():
    """Dynamo counts how often it compiles a function."""
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    setting = replace(TINY, torchcompile=backend)
    for _ in range(3):
        verify.verify(setting)
    assert len(compiled) == 3 * 4
