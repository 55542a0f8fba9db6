"""What several test files share: small networks, images, comparisons."""
import subprocess
import sys

import timm
import torch
import torch.nn as nn

from timm_rla.common.options import parse
from timm_rla.models.blocks import RecurrentBlock
from timm_rla.reproduce.plan import load_table
from timm_rla.train.options import train_parser
from timm_rla.train.run import train as run_training

# Small networks of each layout: model name, arguments that make it small, arguments of the reference. Two blocks in
# one stage, so that a block without a change of shape is there, and N = 20 or 24, which divides no width.
TINY = dict(layers=(1, 2, 1, 1), channels=(8, 16, 32, 64), num_classes=7, hidden_dim=16, reduction=4)
LAYOUTS = {
    'basic': ('rla_resnet18', dict(TINY, context_dim=20), dict(layers=TINY['layers'])),
    'bottleneck': ('rla_resnet50', dict(TINY, context_dim=24), dict(layers=TINY['layers'], bottleneck=True)),
    'cifar': ('rla_resnet20_cifar', dict(num_classes=7), dict(layers=(3, 3, 3), cifar=True)),
}
VARIANTS = {  # arguments of the model, arguments of the reference
    'rla': ({}, {}),
    'rla_se': (dict(attn_layer='se'), dict(se=True)),
    'rla_vector': (dict(vector=True), dict(vector=True)),
}
TWO_BLOCKS = dict(layers=(2, 0, 0, 0), channels=(8, 8, 8, 8))  # for compilers, whose time grows with the blocks
SUMMARY_HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
IMAGE_SIZES = {'basic': (64, 96), 'bottleneck': (64, 96), 'cifar': (16, 24)}


def is_extra(key):
    """Whether a parameter is one of those that layer attention adds."""
    return key.startswith('lstm.') or '.attention.' in key or '.context.' in key


def tiny_model(layout, variant='rla', dtype=torch.float32, **kwargs):
    """Network of a layout and variant, in training mode."""
    name, model_args, _ = LAYOUTS[layout]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**model_args, **VARIANTS[variant][0], **kwargs})
    return randomise(model).to(dtype)


def randomise(model):
    """Weights as of a trained network: timm starts each residual branch at zero, and all attentions much alike."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Linear) and is_extra(name + '.'):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.LSTMCell):
            for p in module.parameters():
                nn.init.normal_(p, std=0.3)
    return model


def images(layout='basic', dtype=torch.float32, batch_size=4, in_chans=3, size=None, seed=1):
    return randn(batch_size, in_chans, *(size or IMAGE_SIZES[layout]), seed=seed, dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, RecurrentBlock)]


def gradients(model, x):
    """Of a loss that is a mean over the images, by the names of the parameters."""
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Comparisons. Errors are relative to the largest entry: those of a sum grow with its terms, not with what is left.

def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_equal_up_to_rounding(actual, expected, tol):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tol * expected.abs().max()


def assert_same(actual, expected, tol=0.):
    """The same for tensors or lists, tuples or dicts of them. None stands for a gradient that is not there."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        named = [(name, actual[name], expected[name]) for name in expected]
    elif isinstance(expected, torch.Tensor):
        named = [('', actual, expected)]
    else:
        named = [(i, a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    for name, a, e in named:
        if e is None:
            assert a is None, name
        else:
            assert a.shape == e.shape and a.dtype == e.dtype, name
            error, largest = (a - e).abs().max().item(), e.abs().max().item()
            assert error <= tol * largest, f'{name}: error {error:.3g}, largest entry {largest:.3g}'


def assert_close(actual, expected, tol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


# Training runs ------------------------------------------------------------------------------------------------------

class Killed(Exception):
    """Stands for a process that ends at this point."""


TINY_RUN = [  # options of a training run that takes a second
    '--device', 'cpu', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--num-classes', '10',
    '--img-size', '8', '--batch-size', '16', '--lr', '0.05', '--warmup-epochs', '1', '--experiment', 'run',
]


def train(data, output, *options):
    return run_training(parse(train_parser(), [*TINY_RUN, '--data-dir', str(data), '--output', str(output), *options]))


def load(path):
    return torch.load(path, weights_only=False)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_same_run(a, b):
    assert (a / 'summary.csv').read_text() == (b / 'summary.csv').read_text()
    assert sorted(p.name for p in a.glob('*.pth*')) == sorted(p.name for p in b.glob('*.pth*'))
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        first, second = load(a / name), load(b / name)
        assert first['epoch'] == second['epoch'] and first['metric'] == second['metric']
        assert_same_tensors(first['state_dict'], second['state_dict'])
        if 'state_dict_ema' in first:
            assert_same_tensors(first['state_dict_ema'], second['state_dict_ema'])
        for key, state in first['optimizer']['state'].items():
            other = second['optimizer']['state'][key]
            assert_same_tensors(*({n: torch.as_tensor(v) for n, v in s.items()} for s in (state, other)))


def run_without_reader(code):
    """Exit code and errors of Python code whose standard output nobody reads any more."""
    code = f'import sys; sys.stdin.read(); {code}'  # not before the pipe is closed
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        error = process.stderr.read()
    return process.returncode, error


def small_table(**kwargs):
    """Table 1 at one depth, on one data set."""
    return load_table('table1', depths=[20], datasets=['cifar10'], **kwargs)


def write_run(results, run, top1, epochs=2):
    """A finished run, with the accuracy of its last epoch; the one before was better."""
    folder = results.path / run.name
    folder.mkdir(parents=True)
    rows = [f'{epoch},1.0,1.0,{top1 + 5 * (epoch + 1 < epochs)},99.0,0.1\n' for epoch in range(epochs)]
    (folder / 'summary.csv').write_text(SUMMARY_HEADER + ''.join(rows))
