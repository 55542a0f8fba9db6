"""Counts, from the models themselves."""
from typing import List

import timm
import torch

from timm_rla.models.warm_start import plain_name  # registers the models, too

from .markdown import table


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
        source = plain_name(name)
        model, plain = _create(name), _create(source)
        total, extra = _count(model), _count(model) - _count(plain)
        fc1 = model.layer1[0].attention.fc1
        rows.append([
            f'`{name}`', model.lstm.input_size, model.lstm.hidden_size, fc1.in_features // fc1.out_features,
            f'{total:,}', f'`{source}`', f'{extra:,}', f'{100 * extra / _count(plain):.2f}'])
    return table(['model', 'N', 'M', 'r', 'parameters', 'on top of', 'extra', '%'], rows)


def _create(name: str) -> torch.nn.Module:
    with torch.device('meta'):
        return timm.create_model(name)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
