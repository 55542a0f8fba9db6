"""Recipes of classification: every key is an option, every value not its default, every part can be built."""
import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_rla.common.networks import NetworkSpec
from timm_rla.common.options import input_spec, parse
from timm_rla.common.recipes import recipes
from timm_rla.train.options import train_parser

CONFIGS = list(recipes('train').values())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    config = yaml.safe_load(path.read_text())
    args, defaults = parse(train_parser(), ['--config', str(path)]), parse(train_parser(), [])
    for key, value in config.items():
        assert getattr(args, key) == value
        assert value != getattr(defaults, key), f'{key} is the default'
    assert path.read_text().startswith('# ') and 'timm-rla ' in path.read_text()

    with torch.device('meta'):
        model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    args.lr = args.lr or 0.1
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    assert scheduler is not None and epochs == args.epochs


FAMILIES = ('', 'se', 'rla_', 'rla_se')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_all_networks_are_evaluated_alike(path):
    """Plain, SE, RLA and IA+RLA of one recipe, during training and by `validate` of the checkpoint afterwards."""
    args = parse(train_parser(), ['--config', str(path)])
    plain = args.model.split('.')[0].removeprefix('rla_')
    found = []
    for family in FAMILIES:
        args.model = family + plain
        with torch.device('meta'):
            model = timm.create_model(args.model)
        found.append(input_spec(args).resolve(model))
        spec = NetworkSpec(checkpoint='last.pth.tar').completed(vars(args))
        found.append(spec.input.resolve(model, spec.use_test_size))
    assert all(config == found[0] for config in found), found
    if path.stem == 'imagenet_paper':  # docs/paper.md: centre 224 of 256
        assert found[0]['input_size'] == (3, 224, 224) and found[0]['interpolation'] == 'bilinear'
        assert round(224 / found[0]['crop_pct']) == 256


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet101', 'seresnet18', 'seresnet50', 'seresnet101'])
def test_data_configuration_is_that_of_the_source(name):
    ours, theirs = timm.get_pretrained_cfg(f'rla_{name}'), timm.get_pretrained_cfg(name)
    for key in ('input_size', 'test_input_size', 'crop_pct', 'test_crop_pct', 'interpolation', 'mean', 'std'):
        assert getattr(ours, key) == getattr(theirs, key), key


def learning_rates(name):
    args = parse(train_parser(), ['--config', str(CONFIGS[0].with_name(f'{name}.yaml')), '--lr', '0.1'])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    return rates


def test_learning_rates_are_those_of_the_paper():
    cifar = [0.1] * 80 + [0.01] * 40 + [0.001] * 40
    imagenet = [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
    assert learning_rates('cifar10') == learning_rates('cifar100') == pytest.approx(cifar)
    assert learning_rates('imagenet_paper') == pytest.approx(imagenet)


@pytest.mark.parametrize('name, decay', [('cifar10', {1e-4}), ('imagenet_paper', {1e-4}), ('imagenet_a3', {0.02, 0.})])
def test_weight_decay(name, decay):
    args = parse(train_parser(), ['--config', str(CONFIGS[0].with_name(f'{name}.yaml'))])
    model = timm.create_model('rla_resnet20_cifar')
    args.lr = 0.1
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert {group['weight_decay'] for group in optimizer.param_groups} == decay
