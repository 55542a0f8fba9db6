"""This package's training against timm's own scripts, unmodified, from a checkout of timm that TIMM_CHECKOUT names."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_rla.common.options import parse
from timm_rla.common.recipes import recipes
from timm_rla.train.options import UNSUPPORTED, train_parser

CHECKOUT = Path(os.environ.get('TIMM_CHECKOUT', ''))
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / 'train.py').is_file(), reason="TIMM_CHECKOUT names no checkout of timm with its train.py")

BASE = ['--device', 'cpu', '--model', 'rla_resnet20_cifar', '--num-classes', '10', '--img-size', '16', '--batch-size',
        '32', '--opt', 'nesterov', '--lr', '0.05', '--warmup-epochs', '1', '--workers', '2']
RECIPES = {
    'plain': [],
    'mixed': ['--mixup', '0.2', '--cutmix', '1.0', '--bce-loss', '--aa', 'rand-m6-mstd0.5-inc1', '--reprob', '0.3'],
    'updates': ['--grad-accum-steps', '2', '--sched-on-updates', '--clip-grad', '1', '--model-ema', '--model-ema-decay',
                '0.9'],
    'lamb': ['--opt', 'lamb', '--lr-base', '0.01', '--lr', '0', '--weight-decay', '0.02', '--drop', '0.1', '--no-aug',
             '--channels-last', '--model-kwargs', 'context=gmp_mlp'],
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16', '--sched', 'multistep', '--decay-milestones', '2', '--smoothing',
                 '0', '--no-prefetcher', '--layer-decay', '0.9'],
}


def call(*command):
    """Run with timm from the checkout."""
    environment = dict(os.environ, PYTHONPATH=str(CHECKOUT), OMP_NUM_THREADS='1')
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


SCRIPTS = {'timm': [CHECKOUT / 'train.py'], 'ours': ['-m', 'timm_rla', 'train']}


def train(which, data, output, *options):
    call(*SCRIPTS[which], *BASE, '--data-dir', data, '--output', output, '--experiment', which, *options)
    with open(output / which / 'summary.csv') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def assert_same_rows(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-4)


@pytest.fixture(scope='module')
def data(digits, tmp_path_factory):
    """800 digits, with colours that tell the augmentations' random numbers apart."""
    from PIL import Image
    root = tmp_path_factory.mktemp('data')
    for path in sorted(digits.rglob('*.png'))[::2]:
        target = root / path.relative_to(digits)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert('RGB').resize((20, 24)).save(target)
    return root


@pytest.mark.parametrize('recipe', RECIPES)
def test_training_equals_that_of_timm(data, tmp_path, recipe):
    options = [*RECIPES[recipe], '--epochs', '3']
    assert_same_rows(train('ours', data, tmp_path, *options), train('timm', data, tmp_path, *options))


def test_checkpoints_go_both_ways(data, tmp_path):
    """Each command goes on from either's checkpoint to the same end, and both validate it to the same accuracy."""
    rows = {which: train(which, data, tmp_path, '--epochs', '3', '--model-ema') for which in SCRIPTS}
    for source in SCRIPTS:
        ends = []
        for which in SCRIPTS:
            resume = tmp_path / f'{source}-{which}'
            checkpoint = tmp_path / f'{source}.pth.tar'
            checkpoint.write_bytes((tmp_path / source / 'checkpoint-1.pth.tar').read_bytes())
            ends.append(train(which, data, resume, '--epochs', '3', '--model-ema', '--resume', checkpoint)[-1:])
        assert_same_rows(*ends)

        options = ['--data-dir', data, '--device', 'cpu', '--img-size', '16', '--num-classes', '10', '--use-ema',
                   '--model', 'rla_resnet20_cifar', '--checkpoint', tmp_path / source / 'last.pth.tar']
        results = [json.loads(call(*command, *options).split('--result')[-1])
                   for command in ([CHECKOUT / 'validate.py'], ['-m', 'timm_rla', 'validate'])]
        assert results[0]['top1'] == pytest.approx(results[1]['top1'], abs=1e-4)
        assert results[0]['top1'] == pytest.approx(rows[source][-1]['eval_top1'], abs=1e-2)


def timm_defaults():
    code = 'import json, train; print(json.dumps(vars(train.parser.parse_args([]))))'
    return json.loads(call('-c', f'import sys; sys.path.insert(0, {str(CHECKOUT)!r}); {code}').splitlines()[-1])


def test_options_are_those_of_timm():
    theirs, ours = timm_defaults(), vars(parse(train_parser(), []))
    assert not any(ours.pop(addition) for addition in ('in_memory', 'log_tensorboard'))
    assert set(ours) <= set(theirs)
    for by_machine in ('device', 'workers'):
        assert type(ours.pop(by_machine)) is type(theirs.pop(by_machine))
    assert {name: theirs[name] for name in ours} == ours
    assert {name: value for name, value in theirs.items() if name not in ours} == UNSUPPORTED


CONFIGS = list(recipes('train').values())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_recipes_are_options_of_timm(path):
    import yaml
    assert set(yaml.safe_load(path.read_text())) <= set(timm_defaults())


def test_arguments_of_a_run_of_timm_are_a_config(data, tmp_path):
    train('timm', data, tmp_path, '--epochs', '1')
    args = parse(train_parser(), ['--config', str(tmp_path / 'timm' / 'args.yaml')])
    assert args.model == 'rla_resnet20_cifar' and args.epochs == 1


@pytest.mark.parametrize('model', ['rla_resnet20_cifar', 'rla_seresnet20_cifar', 'rla_vector_resnet20_cifar'])
def test_scripts_of_timm_with_torchscript(data, tmp_path, model):
    options = ['--model', model, '--epochs', '1', '--torchscript']
    row, = train('timm', data, tmp_path, *options)
    options = ['--data-dir', data, '--device', 'cpu', '--img-size', '16', '--num-classes', '10', '--model', model,
               '--checkpoint', tmp_path / 'timm' / 'last.pth.tar', '--torchscript', '--workers', '1']
    result = json.loads(call(CHECKOUT / 'validate.py', *options).split('--result')[-1])
    assert result['top1'] == pytest.approx(row['eval_top1'], abs=1e-2)
    call(CHECKOUT / 'benchmark.py', '--model', model, '--device', 'cpu', '--img-size', '16', '-b', '2', '--bench',
         'both', '--num-bench-iter', '10', '--num-warm-iter', '1', '--torchscript')


def test_export_of_timm(tmp_path):
    onnx = pytest.importorskip('onnx')
    model = timm.create_model('rla_resnet20_cifar')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth.tar')
    call(CHECKOUT / 'onnx_export.py', tmp_path / 'a.onnx', '--model', 'rla_resnet20_cifar', '--img-size', '32',
         '--checkpoint', tmp_path / 'a.pth.tar', '--check-forward')
    onnx.checker.check_model(str(tmp_path / 'a.onnx'), full_check=True)
