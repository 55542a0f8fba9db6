"""Recipes under train_configs/: every key is an option, every value not its default, every part can be built."""
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_rla.train.options import parse, train_parser

CONFIGS = sorted((Path(__file__).parents[1] / 'train_configs').glob('*.yaml'))


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
