"""Small networks, runs of training and caches for the tests of the Hub."""
import timm
import torch

import timm_rla_cli as cli
from timm_rla.common.options import parse
from timm_rla.train import run
from timm_rla.train.options import train_parser

SOURCE = 'timm/resnet18.a1_in1k'
SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
WEIGHTS = 'model.safetensors'
ORIGIN = 'org/tiny'
TINY = [
    '--device', 'cpu', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--num-classes', '10',
    '--img-size', '8', '--batch-size', '16', '--lr', '0.05', '--warmup-epochs', '1', '--experiment', 'run',
]
MODEL_KWARGS = ['--model-kwargs', 'layers=(1,1,1)', 'context=gmp', 'hidden_dim=2']


def train(data, output, *options):
    return run.train(parse(train_parser(), [*TINY, '--data-dir', str(data), '--output', str(output), *options]))


def load(path):
    return torch.load(path, weights_only=False)



def create(cache, name='rla_resnet18', **kwargs):
    small = SMALL if name.startswith('rla_resnet18') else {}
    return timm.create_model(name, pretrained=True, cache_dir=cache, **{**small, **kwargs}).eval()


def images(size=64, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def assert_same_logits(a, b, size=64):
    assert torch.equal(a(images(size)), b(images(size)))


def files(folder):
    """Weights in a cache, complete or not."""
    return [p for p in folder.rglob('*') if {'blobs', 'snapshots'} & {*p.parts[:-1]} and not p.is_dir()]


def export(checkpoint, directory, *options):
    assert cli.main(['export', str(checkpoint), str(directory), *options]) == 0
    return directory


def trained(checkpoint, key='state_dict'):
    model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), context='gmp', hidden_dim=2)
    model.load_state_dict(load(checkpoint)[key])
    return model.eval()


def reopened(hub, folder, cache):
    hub.add(ORIGIN, **{p.name.replace('.', '__'): p.read_bytes() for p in folder.iterdir()})
    return create(cache, f'hf-hub:{ORIGIN}')
