"""What the table examples/other_starts.yaml needs: other initial weights, and an LSTM without weight decay.

    python examples/other_starts.py 0 1 2
    timm-rla reproduce examples/other_starts.yaml --seeds 0 1 2 --epochs 10 --data-dir data --in-memory

The first line writes the weights that runs with these seeds start from. It is run in the folder that holds examples/,
where runs import this file, too (`--device-modules`).
"""
import sys
from pathlib import Path

import timm
import torch
from packaging.version import Version
from timm.utils import random_seed

from timm_rla.models.network import RecurrentLayerAttention


def no_weight_decay(model):
    """Parameters that timm's optimizers spare from weight decay."""
    return {name for name, _ in model.named_parameters() if name.startswith('lstm.')}


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


if Version(timm.__version__) < Version('1.0.27'):  # they ask only where biases are spared, too
    raise ImportError(f'needs timm 1.0.27 or newer, not {timm.__version__}')
RecurrentLayerAttention.no_weight_decay = no_weight_decay

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
