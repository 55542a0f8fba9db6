"""Class activation maps equal captum's and those of the equations."""
import pytest
import reference
import torch
from captum.attr import LayerGradCam
from small_networks import TINY, build, hook_count, images

from timm_rla.analysis import grad_cam, residual_norms


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
    (dict(layers=['lstm']), ['lstm', 'feature map']),
    (dict(layers=['unused']), ['unused', 'not called']),
    (dict(target=-1), ['-1', '0 to 9']),
    (dict(target=torch.tensor([0, 10])), ['10', '0 to 9']),
], ids=str)
def test_grad_cam_bad_input(arguments, words):
    model = build('rla_resnet20_cifar', **TINY)
    model.unused = torch.nn.Identity()
    with pytest.raises(ValueError) as e:
        grad_cam(model, images(), **arguments)
    assert all(word in str(e.value) for word in words)


def test_other_layers():
    model = build('resnet20_cifar', **TINY)
    cam = grad_cam(model, images(), layers=['layer3', 'act1'])
    assert {name: tuple(maps.shape) for name, maps in cam.maps.items()} == {'layer3': (2, 4, 4), 'act1': (2, 16, 16)}
    with pytest.raises(ValueError, match='residual blocks'):
        residual_norms(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
