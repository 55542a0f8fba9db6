"""What the table examples/one_change.yaml needs: other initial weights, and an LSTM without weight decay.

    python examples/one_change.py 0 1 2
    timm-rla reproduce examples/one_change.yaml --seeds 0 1 2 --epochs 10 --data-dir data

The first line writes the weights that runs with these seeds start from. Both are run in the folder that holds
examples/, where runs import this file for its network (`--device-modules`).
"""
import sys
from pathlib import Path

import timm
import torch
from packaging.version import Version
from timm.models import register_model
from timm.utils import random_seed


@register_model
def no_decay_resnet20(pretrained=False, **kwargs):
    """RLA-20 with an LSTM that timm's optimizers spare from weight decay.

    Raises:
        RuntimeError: timm is older than 1.0.27, which asks a network for such parameters only in other recipes.
    """
    if Version(timm.__version__) < Version('1.0.27'):
        raise RuntimeError(f'needs timm 1.0.27 or newer, not {timm.__version__}')
    model = timm.create_model('rla_resnet20_cifar', pretrained=pretrained, **kwargs)
    names = {name for name, _ in model.named_parameters() if name.startswith('lstm.')}
    model.no_weight_decay = lambda: names
    return model


def full_branch(model):
    """Double the last norm of each block: an attention of 0.5 leaves the residual branch as in the plain network."""
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.bn2.weight.mul_(2)


def forget_bias(model):
    """Let the LSTM remember: 1 for the bias of its forget gate, the second of four."""
    hidden = model.lstm.hidden_size
    for bias, value in ((model.lstm.bias_ih, 1.), (model.lstm.bias_hh, 0.)):
        bias[hidden:2 * hidden] = value


if __name__ == '__main__':
    folder = Path('output/starts')
    folder.mkdir(parents=True, exist_ok=True)
    for seed in map(int, sys.argv[1:] or ['0']):
        for change in (full_branch, forget_bias):
            random_seed(seed)  # as a run begins: all other weights are those that it starts from without the change
            model = timm.create_model('rla_resnet20_cifar')
            with torch.no_grad():
                change(model)
            file = folder / f'{change.__name__}-seed{seed}.pth'
            torch.save(model.state_dict(), file)
            print(file)
