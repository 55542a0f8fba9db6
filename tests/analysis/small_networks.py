"""Small networks and images for the tests of the analysis."""
import torch
from timm.models import create_model

TINY = dict(layers=(1, 1, 1))


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
