"""What a network has learned: recordings equal the equations, maps equal captum's, pictures have room for all."""
import csv
import json
import os
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from captum.attr import LayerGradCam
from PIL import Image
from timm.data import ImageNetInfo
from timm.models import create_model
from timm.utils import reparameterize_model
from torch.nn.parallel import DistributedDataParallel

from timm_rla import cli
from timm_rla.analysis import (
    Moments,
    attention_plot,
    classes,
    grad_cam,
    gradcam_plot,
    normalize_attention,
    record_attention,
    residual_norms,
    stack_attention,
)
from timm_rla.errors import UserError
from timm_rla.extras import import_pyplot
from timm_rla.quickstart import write_digits
from timm_rla.train.options import parse, train_parser
from timm_rla.train.run import train

TINY = dict(layers=(1, 1, 1))
EXAMPLE = Path(__file__).parents[1] / 'examples' / 'what_it_learned.py'


def build(name, seed=0, **kwargs):
    """A model in eval mode whose norms and attentions do something."""
    torch.manual_seed(seed)
    model = create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def images(batch=2, size=16, **kwargs):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), **kwargs)


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())


# recording

@pytest.mark.parametrize('name', ['rla_resnet20_cifar', 'rla_vector_resnet20_cifar', 'rla_seresnet20_cifar'])
def test_recorded_attention_is_that_of_the_equations(name, monkeypatch):
    model, x = build(name, **TINY).double(), images(dtype=torch.float64)
    heads = {}

    def mlp(x, params, block, original=reference.mlp):
        heads[block] = torch.sigmoid(original(x, params, block))
        return original(x, params, block)

    monkeypatch.setattr(reference, 'mlp', mlp)
    reference.logits(model.state_dict(), x, cifar=True, se='se' in name, vector='vector' in name, **TINY)
    with record_attention(model) as attention:
        model(x)
    assert list(attention) == ['layer1.0', 'layer2.0', 'layer3.0']
    for block, a in attention.items():
        assert a.shape == (2, 1 if 'vector' not in name else {'1': 16, '2': 32, '3': 64}[block[5]])
        torch.testing.assert_close(a, heads[f'{block}.attention'], rtol=1e-10, atol=0)
    assert stack_attention(attention).shape == (2, 3)
    assert hook_count(model) == 0


@pytest.fixture(scope='module')
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp('gloo') / 'store'
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class CountingBackend:
    """Backend of torch.compile that counts how often compiled code runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)
        return run


@pytest.mark.parametrize('wrapper', ['compiled', 'compiled in place', 'compiled block', 'ddp', 'ddp of compiled'])
def test_wrapped_models(wrapper, process_group):
    torch.compiler.reset()
    model, x = build('rla_resnet20_cifar', **TINY), images()
    with record_attention(model) as expected:
        model(x)
    maps = grad_cam(model, x).maps
    backend = CountingBackend()
    wrapped = model
    if wrapper == 'compiled in place':
        model.compile(backend=backend)
    elif wrapper == 'compiled block':
        model.layer2[0] = torch.compile(model.layer2[0], backend=backend)
    elif 'compiled' in wrapper:
        wrapped = torch.compile(model, backend=backend)
    if 'ddp' in wrapper:
        wrapped = DistributedDataParallel(wrapped)

    with torch.no_grad():
        wrapped(x)
        calls = backend.calls
        assert (calls > 0) == ('compiled' in wrapper)
        with record_attention(wrapped) as attention:
            wrapped(x)
        assert list(attention) == list(expected)
        assert all(torch.equal(attention[block], expected[block]) for block in expected)
        assert backend.calls == calls
        if wrapper != 'compiled block':  # there the names of the norms change
            recorded = grad_cam(wrapped, x).maps
            assert all(torch.equal(recorded[layer], maps[layer]) for layer in maps)
        assert hook_count(wrapped) == 0
        wrapped(x)
        assert (backend.calls > calls) == ('compiled' in wrapper)  # compiled code is in use again


def test_nothing_is_left_behind_after_an_error():
    model = build('rla_resnet20_cifar', **TINY).train()
    model.layer2[0].bn1.eval()  # a part that is frozen
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), record_attention(model):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        with record_attention(model):
            model(torch.zeros(1, 5, 8, 8))
    with pytest.raises(RuntimeError):
        grad_cam(model, torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError):
        grad_cam(model, images(), target=10)
    assert hook_count(model) == 0 and [module.training for module in model.modules()] == modes


def test_only_the_last_pass_is_kept():
    model = build('rla_resnet20_cifar', **TINY)
    with record_attention(model) as attention:
        model(images())
        first = weakref.ref(attention['layer1.0'])
        model(images(batch=3))
        assert first() is None and attention['layer1.0'].shape == (3, 1)
        assert not attention['layer1.0'].requires_grad


def test_model_without_attention():
    with pytest.raises(ValueError, match='rla_'):
        with record_attention(build('resnet20_cifar', **TINY)):
            pass


def test_features_only_models_have_attention():
    model = create_model('rla_resnet20_cifar', features_only=True, **TINY)
    with record_attention(model) as attention:
        model(images())
    assert len(attention) == 3


def test_attention_in_training_and_after_folding():
    """The other forms of a block have their attention recorded alike."""
    model = build('rla_resnet20_cifar', **TINY)
    with record_attention(model) as expected:
        model(images())
    folded = reparameterize_model(model)
    with record_attention(folded) as attention:
        folded(images())
    for block in expected:
        torch.testing.assert_close(attention[block], expected[block], rtol=1e-5, atol=1e-6)

    model.train()
    x = images(batch=4)
    with record_attention(model) as attention:
        model(x)
    hook = model.layer1[0].bn2.register_forward_hook(lambda *args: None)  # which needs the general form
    with record_attention(model) as general:
        model(x)
    hook.remove()
    for block in general:
        torch.testing.assert_close(attention[block], general[block], rtol=1e-5, atol=1e-6)


def test_normalized_attention():
    a = torch.rand(5, 9, dtype=torch.float64)
    expected = (a.numpy() - a.numpy().mean(1, keepdims=True)) / a.numpy().std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(normalize_attention(a), expected)
    assert (normalize_attention(torch.full((2, 9), 0.3)) == 0).all()  # a neutral warm start


# statistics

@pytest.mark.parametrize('offset', [0, 1e8])  # there a difference of sums of squares has no correct digit
def test_moments_equal_numpy_on_everything(offset):
    generator = np.random.default_rng(0)
    values, groups = generator.normal(offset, 1, (500, 4)), generator.integers(0, 5, 500)
    groups[groups == 3] = 4  # one class has no image
    cuts = [0, 1, 2, 100, 100, 317, 500]
    parts = [Moments.of(torch.tensor(values[a:b]), torch.tensor(groups[a:b]), 5) for a, b in zip(cuts, cuts[1:])]
    streamed = parts[0]
    for part in parts[1:]:
        streamed = Moments.merge([streamed, part])
    for moments in (streamed, Moments.merge(parts)):
        for k in (0, 1, 2, 4):
            np.testing.assert_allclose(moments.mean[k], values[groups == k].mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(moments.std[k], values[groups == k].std(0), rtol=1e-7 if offset else 1e-12)
        assert moments.count.tolist() == [(groups == k).sum() for k in range(5)]
        assert moments.std[3].isnan().all()
        whole = moments.over_groups()
        assert whole.count.tolist() == [500]
        np.testing.assert_allclose(whole.mean[0], values.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(whole.std[0], values.std(0), rtol=1e-7 if offset else 1e-12)


# Grad-CAM

@pytest.mark.parametrize('name, size', [
    ('resnet18', 64), ('resnet50', 64), ('seresnet18', 64), ('resnext50_32x4d', 64), ('rla_resnet18', 64),
    ('rla_resnet50', 64), ('resnet20_cifar', 16), ('rla_seresnet20_cifar', 16), ('rla_vector_resnet20_cifar', 16),
])
def test_maps_equal_captum(name, size):
    model, x = build(name, num_classes=10), images(size=size)
    cam = grad_cam(model, x, target=3, relu=False)
    layers = list(cam.maps)
    blocks = [n for n, m in model.named_modules() if hasattr(m, 'downsample')]
    assert [layer.rsplit('.', 1)[0] for layer in layers] == blocks
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        expected = LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=3).detach()[:, 0]
        assert expected.abs().max() > 0
        torch.testing.assert_close(cam.maps[layer], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def plain_logits(params, x, layers):
    """The CIFAR network without attention, with no operation in place."""
    x = torch.relu(reference.batch_norm(torch.conv2d(x, params['conv1.weight'], padding=1), params, 'bn1', False))
    for stage, blocks in enumerate(layers):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            a = reference.residual_branch(x, params, f'layer{stage + 1}.{block}', stride, False, False)
            x = torch.relu(reference.padded_shortcut(x, a.shape[1], stride) + a)
    return reference.linear(x.mean((2, 3)), params, 'fc')


@pytest.mark.parametrize('name', ['resnet20_cifar', 'rla_resnet20_cifar', 'rla_vector_resnet20_cifar'])
def test_maps_equal_those_of_the_equations(name, monkeypatch):
    layers = (2, 1, 1)
    model, x = build(name, layers=layers).double(), images(dtype=torch.float64)
    branches = []

    def residual_branch(*args, original=reference.residual_branch):
        branches.append(original(*args))
        return branches[-1]

    monkeypatch.setattr(reference, 'residual_branch', residual_branch)
    params = model.state_dict()
    x.requires_grad_()
    if name.startswith('rla'):
        logits = reference.logits(params, x, layers, cifar=True, vector='vector' in name)
    else:
        logits = plain_logits(params, x, layers)
    target = torch.tensor([1, 7])
    gradients = torch.autograd.grad(logits[0, 1] + logits[1, 7], branches)
    for relu in (False, True):
        cam = grad_cam(model, x.detach(), target, relu=relu)
        torch.testing.assert_close(cam.logits, logits.detach(), rtol=1e-10, atol=1e-12)
        for maps, a, gradient in zip(cam.maps.values(), branches, gradients):
            expected = torch.einsum('bc,bchw->bhw', gradient.mean((2, 3)), a.detach())
            torch.testing.assert_close(maps, expected.relu() if relu else expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_grad_cam_changes_nothing(mode):
    model = build('rla_resnet20_cifar', **TINY).train()
    model.layer2[0].bn1.eval()
    model.requires_grad_(False)
    model.fc.requires_grad_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with mode():
        x = images()
        cam = grad_cam(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] * (len(list(model.parameters())) - 2) + [True] * 2
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad and hook_count(model) == 0
    expected = grad_cam(model.requires_grad_().eval(), images())
    assert torch.equal(cam.target, expected.logits.argmax(1))
    torch.testing.assert_close(cam.maps, expected.maps, rtol=1e-5, atol=1e-5)  # frozen weights: products in other order


@pytest.mark.parametrize('arguments, words', [
    (dict(layers=['layer2.0.bn9']), ['layer2.0.bn9', 'layer2.0.bn1']),
    (dict(layers=['fc']), ['fc', 'feature map']),
    (dict(layers=['layer1.0']), ['layer1.0', 'feature map']),  # a recurrent block gives its state, too
    (dict(layers=['lstm']), ['lstm', 'not called']),
    (dict(target=-1), ['-1', '0 to 9']),
    (dict(target=torch.tensor([0, 10])), ['10', '0 to 9']),
], ids=str)
def test_grad_cam_bad_input(arguments, words):
    with pytest.raises(ValueError) as e:
        grad_cam(build('rla_resnet20_cifar', **TINY), images(), **arguments)
    assert all(word in str(e.value) for word in words)


def test_other_layers():
    model = build('resnet20_cifar', **TINY)
    cam = grad_cam(model, images(), layers=['layer3', 'act1'])
    assert {name: tuple(maps.shape) for name, maps in cam.maps.items()} == {'layer3': (2, 4, 4), 'act1': (2, 16, 16)}
    with pytest.raises(ValueError, match='residual blocks'):
        residual_norms(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))


# names of classes

def test_imagenet_classes():
    names = classes.class_names(1000)
    assert classes.find_class('0', names) == classes.find_class('tench', names) == 0
    assert classes.find_class('Tinca tinca', names) == classes.find_class(names[0], names) == 0
    assert classes.find_class('killer whale', names) == 148
    folders = type('Dataset', (), dict(class_to_idx={s: i for i, s in enumerate(ImageNetInfo().label_names())}))
    assert classes.class_names(1000, folders) == names


@pytest.mark.parametrize('text, words', [
    ('1000', ['1000', '0 to 999']),
    ('-1', ['-1', '0 to 999']),
    ('crane', ['134', '517']),
    ('tensh', ['tensh', 'tench']),
])
def test_bad_class(text, words):
    with pytest.raises(UserError) as e:
        classes.find_class(text, classes.class_names(1000))
    assert all(word in str(e.value) for word in words)


# pictures

DEPTHS = {5: (2, 2, 1), 8: (2, 2, 2, 2), 16: (3, 4, 6, 3), 33: (3, 4, 23, 3), 54: (18, 18, 18)}


def block_names(layers):
    return [f'layer{stage + 1}.{block}' for stage, blocks in enumerate(layers) for block in range(blocks)]


def moments_of_classes(blocks, num_classes):
    values = torch.rand(2 * num_classes, len(blocks), generator=torch.Generator().manual_seed(0))
    return Moments.of(values, torch.arange(2 * num_classes) % num_classes, num_classes)


def assert_no_overlap(figure):
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    legends = list(figure.legends) + [axes.legend_ for axes in figure.axes if axes.legend_]
    boxes = [legend.get_window_extent(renderer) for legend in legends] + [t.get_window_extent() for t in figure.texts]
    for axes in figure.axes:
        ticks = [tick for tick in axes.get_xticklabels() if tick.get_text() and tick.get_visible()]
        labels = [*ticks, axes.title, axes.xaxis.label, axes.yaxis.label]
        boxes += [axes.get_window_extent(renderer)]
        boxes += [label.get_window_extent(renderer) for label in labels if label.get_text()]
    boxes = [box.padded(-1) for box in boxes]
    for i, box in enumerate(boxes):
        assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1)
        assert figure.bbox.padded(1).containsy(box.y0) and figure.bbox.padded(1).containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[i + 1:])


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are when they would be written."""
    drawn = []
    for module in (attention_plot, gradcam_plot):
        monkeypatch.setattr(module, 'save_picture', lambda figure, output, **kwargs: drawn.append(figure))
    yield drawn
    import_pyplot().close('all')


@pytest.mark.parametrize('depth', DEPTHS)
def test_curves_have_room(depth, figures):
    blocks = block_names(DEPTHS[depth])
    moments = moments_of_classes(blocks, 20)
    names = [f'a rather long name of class {k}' for k in range(20)]
    attention_plot.plot_attention(moments, blocks, Path('a.png'), title='rla_vector_resnet101, 50,000 images')
    attention_plot.plot_classes(moments, blocks, names, Path('c.png'), title='rla_vector_resnet101, 50,000 images')
    for figure in figures:
        assert_no_overlap(figure)
    curve, _ = figures
    marked = curve.axes[0].get_legend_handles_labels()[0][0].get_xdata()
    assert [blocks[i].split('.')[1] for i in marked] == ['0'] * len(DEPTHS[depth])


def framed(figure):
    pictures = [axes for axes in figure.axes if axes.images and axes.get_title()]
    return [axes.get_title() for axes in pictures if axes.spines['top'].get_visible()]


@pytest.mark.parametrize('depth, networks', [(5, 1), (5, 2), (8, 2), (16, 1), (33, 2)])
def test_maps_have_room(depth, networks, figures):
    blocks = block_names(DEPTHS[depth])
    maps = {f'{block}.bn2': torch.rand(4, 4) for block in blocks}
    picture = gradcam_plot.NetworkMaps('resnet', torch.rand(3, 16, 16), maps)
    attention = {block: float(index % 7 == 3) + index / 99 for index, block in enumerate(blocks)}
    recurrent = picture._replace(name='rla_resnet', attention=attention)
    title = 'n02105412_10026.JPEG: killer whale, 93.2% (predicted)'
    page = gradcam_plot.Explanation(title, [picture, recurrent][-networks:])
    gradcam_plot.plot_gradcam([page] * (2 if depth < 16 else 1), Path('g.png'))
    assert_no_overlap(figures[0])
    highest = max(recurrent.attention, key=recurrent.attention.get)
    assert set(framed(figures[0])) == set(attention_plot.block_labels([highest]))


def test_no_block_is_framed_where_all_are_alike(figures):
    maps = {f'layer1.{i}.bn2': torch.zeros(4, 4) for i in range(3)}  # no evidence anywhere
    attention = {f'layer1.{i}': 0. for i in range(3)}
    gradcam_plot.plot_gradcam([gradcam_plot.Explanation(
        'x', [gradcam_plot.NetworkMaps('rla', torch.rand(1, 8, 8), maps, attention)])], Path('g.png'))
    assert not framed(figures[0])


# command line

@pytest.fixture(scope='module')
def trained(image_folder, tmp_path_factory):
    """Checkpoints of a small RLA network and of a plain one, in the folders of their runs."""
    output = tmp_path_factory.mktemp('runs')
    options = ['--data-dir', str(image_folder), '--output', str(output), '--device', 'cpu', '--workers', '0',
               '--model-kwargs', 'layers=(1,1,1)', '--img-size', '8', '--batch-size', '16', '--epochs', '1',
               '--mean', '0.5', '0.5', '0.5', '--std', '0.4', '0.4', '0.4']
    return [train(parse(train_parser(), [*options, '--model', model])) / 'last.pth.tar'
            for model in ('rla_resnet20_cifar', 'resnet20_cifar')]


CPU = ['--device', 'cpu']
READ = [*CPU, '--workers', '0']


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """Run a command that must fail; returns its line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        assert cli.main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert error.count('error:') == 1 and 'Traceback' not in error, error
        assert 'error:' in error.strip().splitlines()[-1], error
        return error.strip().splitlines()[-1]

    return run


def read_rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_attention_command(trained, image_folder, capsys):
    checkpoint = trained[0]
    assert cli.main(['attention', '--checkpoint', str(checkpoint), '--data-dir', str(image_folder), *READ,
                     '--batch-size', '7', '--class', '3', '4']) == 0
    out = capsys.readouterr().out.splitlines()
    folder = checkpoint.parent
    assert out[-3:] == [str(folder / name) for name in ('attention.png', 'attention-classes.png', 'attention.csv')]
    assert all(Path(path).stat().st_size > 200 for path in out[-3:])

    # everything at once, and numpy
    model = create_model('rla_resnet20_cifar', **TINY).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    paths = sorted((image_folder / 'validation').rglob('*.png'))
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths]) / 255
    with record_attention(model) as attention, torch.no_grad():
        model(torch.tensor((pixels - 0.5) / 0.4, dtype=torch.float32).permute(0, 3, 1, 2))
    values = stack_attention(attention).double().numpy()
    labels = np.array([int(path.parent.name) for path in paths])
    rows = read_rows(folder / 'attention.csv')
    assert len(rows) == 3 * (1 + 10)
    for row in rows:
        chosen = values[labels == int(row['class'])] if row['class'] else values
        block = chosen[:, list(attention).index(row['block'])]
        assert int(row['images']) == len(block)
        assert float(row['mean']) == pytest.approx(block.mean(), abs=1e-6)
        assert float(row['std']) == pytest.approx(block.std(), abs=1e-6)
    for line, row in zip(out[1:4], rows):
        assert line.split()[1:3] == [f'{float(row["mean"]):.4f}', f'{float(row["std"]):.4f}']


def test_attention_picture_goes_into_the_model_card(trained, tmp_path):
    (trained[0].parent / 'attention.png').touch()
    assert cli.main(['export', str(trained[0]), str(tmp_path / 'export')]) == 0
    assert '(attention.png)' in (tmp_path / 'export' / 'README.md').read_text()


def test_attention_over_processes(trained, image_folder, tmp_path):
    """29 images on 2 processes: timm's sampler reads one twice, which must not count."""
    data = tmp_path / 'data'
    for path in sorted((image_folder / 'validation').rglob('*.png'))[:29]:
        copy = data / 'validation' / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    arguments = ['attention', '--checkpoint', str(trained[0]), '--data-dir', str(data), *READ, '--batch-size', '4']
    assert cli.main([*arguments, '--output', str(tmp_path / 'one.svg')]) == 0
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'timm_rla',
         *arguments, '--output', str(tmp_path / 'two.pdf')],
        capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('block') == 1  # the first process alone prints
    for one, two in zip(read_rows(tmp_path / 'one.csv'), read_rows(tmp_path / 'two.csv'), strict=True):
        assert one['images'] == two['images'] and (one['class'], one['block']) == (two['class'], two['block'])
        for key in ('mean', 'std'):  # float32 differs in the last digit between batches
            assert float(one[key]) == pytest.approx(float(two[key]), abs=1e-7)
    assert '<svg' in (tmp_path / 'one.svg').read_text() and (tmp_path / 'two.pdf').read_bytes()[:4] == b'%PDF'


@pytest.mark.parametrize('options, words', [
    (['--model', 'resnet20_cifar'], ['resnet20_cifar', 'rla_']),
    (['--model', 'rla_resnet20_cifr'], ['rla_resnet20_cifr', 'rla_resnet20_cifar']),
    (['--model', 'rla_resnet20_cifar', '--data-dir', 'nowhere'], ['nowhere']),
    (['--model', 'rla_resnet20_cifar', '--data-dir', 'empty'], ['empty']),
    (['--model', 'rla_resnet20_cifar', '--class', '10'], ['10', '0 to 9']),
    (['--model', 'rla_resnet20_cifar', '--class', 'frog'], ['frog']),
    (['--model', 'rla_resnet20_cifar', '--num-classes', '5'], ['5', '10']),
    (['--model', 'rla_resnet20_cifar', '--output', 'a.bmp'], ['a.bmp', '.png, .svg or .pdf']),
    (['--checkpoint', 'no.pth'], ['no.pth']),
    ([], ['--model']),
], ids=lambda v: ' '.join(v[-2:]) if v and v[0].startswith('--') else '')
def test_attention_bad_input(fails, tmp_path, image_folder, options, words):
    (tmp_path / 'empty').mkdir()
    line = fails('attention', '--data-dir', image_folder, *READ, *options)
    assert all(word in line for word in words), line


@pytest.fixture
def pictures(tmp_path):
    """Images of different sizes and modes, and among them one that cannot be read."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name, mode, size in (('a.png', 'RGB', (40, 30)), ('b.jpg', 'L', (9, 17)), ('d.png', 'RGBA', (8, 8))):
        Image.effect_noise(size, 64).convert(mode).save(folder / name)
    (folder / 'c.png').write_bytes((folder / 'a.png').read_bytes()[:200])
    return folder


def test_gradcam_command(trained, pictures, tmp_path, capsys):
    rla, plain = map(str, trained)
    arguments = ['gradcam', str(pictures / 'a.png'), '--checkpoint', rla, *CPU]
    for output in ('g.png', 'g.svg', 'g.pdf'):
        assert cli.main([*arguments, '--baseline-checkpoint', plain, '--class', '3',
                         '--output', str(tmp_path / output)]) == 0
        assert f'{tmp_path / output}  a.png: 3, ' in capsys.readouterr().out
    assert 'resnet20_cifar' not in (tmp_path / 'g.svg').read_text()[:200]
    heights = [Image.open(tmp_path / 'g.png').height]
    assert cli.main([*arguments, '--output', str(tmp_path / 'g.png')]) == 0  # without the plain network above
    heights.append(Image.open(tmp_path / 'g.png').height)
    assert heights[0] > heights[1]
    assert '(predicted)' in capsys.readouterr().out


@pytest.mark.parametrize('sheet', [False, True])
def test_other_images_are_done_where_one_cannot_be_read(trained, pictures, fails, tmp_path, sheet):
    (tmp_path / 'nothing').mkdir()
    line = fails('gradcam', tmp_path / 'nothing', pictures, tmp_path / 'none.png', '--checkpoint', trained[0], *CPU,
                 *['--sheet'][:sheet])
    assert f'{tmp_path / "nothing"}: a folder without images' in line
    assert str(pictures / 'c.png') in line and f'{tmp_path / "none.png"}: No such file' in line
    written = sorted(path.name for path in tmp_path.glob('gradcam*'))
    assert written == (['gradcam.png'] if sheet else ['gradcam-1.png', 'gradcam-2.png', 'gradcam-4.png'])


def test_names_of_classes_come_from_a_dataset(trained, pictures, tmp_path, capsys, fails):
    data = tmp_path / 'named'
    for name in 'airplane automobile bird cat deer dog frog horse ship truck'.split():
        (data / 'validation' / name).mkdir(parents=True)
        (data / 'validation' / name / 'a.png').write_bytes((pictures / 'd.png').read_bytes())
    arguments = ['gradcam', str(pictures / 'a.png'), '--checkpoint', str(trained[0]), *CPU, '--data-dir', str(data)]
    assert cli.main([*arguments, '--class', 'Cat']) == 0
    assert 'a.png: cat, ' in capsys.readouterr().out
    line = fails(*arguments, '--class', 'cut')
    assert 'cut' in line and 'cat' in line


@pytest.mark.parametrize('options, words', [
    (['empty'], ['empty', 'without images']),
    (['a.png', '--layers', 'layer3.0.bn9'], ['layer3.0.bn9', 'layer3.0.bn2']),
    (['a.png', '--class', '10'], ['10', '0 to 9']),
    (['a.png', '--class', 'frog'], ['frog', '0 to 9']),
    (['a.png', '--class', '1', '2'], ['2', '1']),
    (['a.png', '--output', 'g.gif'], ['g.gif', '.png, .svg or .pdf']),
    (['a.png', '--baseline-model', 'resnet18'], ['resnet18', '1000', '10']),
    (['a.png', '--baseline-checkpoint', 'no.pth'], ['no.pth']),
    (['a.png', '--img-size', '0'], ['model input', 'height']),
    ([], ['IMAGE']),
], ids=lambda v: ' '.join(v) or 'none')
def test_gradcam_bad_input(trained, fails, pictures, monkeypatch, options, words):
    monkeypatch.chdir(pictures)
    (pictures / 'empty').mkdir()
    line = fails('gradcam', *options, '--checkpoint', trained[0], *CPU)
    assert all(word in line for word in words), line
    assert not list(pictures.glob('gradcam*'))


@pytest.mark.parametrize('command', ['attention', 'gradcam'])
def test_missing_extra_says_what_to_install(fails, monkeypatch, command):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    line = fails(command, *['a.png'][:command == 'gradcam'], '--model', 'rla_resnet20_cifar', *CPU)
    assert "pip install 'timm_rla[analysis]'" in line


def test_analysis_imports_no_matplotlib():
    code = 'import sys, json, timm_rla.analysis; print(json.dumps(sorted(sys.modules)))'
    modules = json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)
    assert 'timm_rla.analysis.gradcam' in modules and 'matplotlib' not in modules


def test_example(tmp_path, monkeypatch, digits, capsys):
    """The script with cells, from top to bottom, on the digits that are written already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'output' / 'what_it_learned').mkdir(parents=True)
    (tmp_path / 'output' / 'what_it_learned' / 'digits').symlink_to(write_digits(digits))
    found = runpy.run_path(str(EXAMPLE))
    assert EXAMPLE.read_text().count('# %%') >= 5
    assert int(found['moments'].count.sum()) == 360
    written = [path for path in capsys.readouterr().out.splitlines() if path.endswith('.png')]
    assert [Path(path).name for path in written] == \
        ['curves.png', 'attention.png', 'attention-classes.png', 'gradcam.png']
    assert all(Path(path).stat().st_size > 5000 for path in written)
