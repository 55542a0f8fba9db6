"""Counts, from the models themselves."""
from typing import List

import timm
import torch

import timm_rla  # noqa: F401, registers the models

from .markdown import table

FAMILIES = {  # prefix of the names: that of the network without layer attention
    'rla_vector_': '',
    'rla_se': 'se',
    'rla_': '',
}


def models() -> List[str]:
    """ImageNet networks, 1000 classes."""
    return _table([name for name in timm.list_models('rla_*') if not name.endswith('_cifar')])


def cifar_models() -> List[str]:
    """CIFAR networks, 10 classes, depths 20 and 56."""
    return _table([
        f'{family}{depth}_cifar'
        for family in ('rla_resnet', 'rla_seresnet', 'rla_vector_resnet') for depth in (20, 56)
    ])


def _table(names: List[str]) -> List[str]:
    rows = []
    for name in names:
        plain_name = _plain_name(name)
        model, plain = _create(name), _create(plain_name)
        total, extra = _count(model), _count(model) - _count(plain)
        fc1 = model.layer1[0].attention.fc1
        rows.append([
            f'`{name}`', model.lstm.input_size, model.lstm.hidden_size, fc1.in_features // fc1.out_features,
            f'{total:,}', f'`{plain_name}`', f'{extra:,}', f'{100 * extra / _count(plain):.2f}'])
    return table(['model', 'N', 'M', 'r', 'parameters', 'on top of', 'extra', '%'], rows)


def _plain_name(name: str) -> str:
    prefix = next(prefix for prefix in FAMILIES if name.startswith(prefix))
    return FAMILIES[prefix] + name.removeprefix(prefix)


def _create(name: str) -> torch.nn.Module:
    with torch.device('meta'):
        return timm.create_model(name)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
