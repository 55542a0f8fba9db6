"""Fixtures of the tests of the Hub: a server on loopback, and runs to publish."""
import time
import types

import pytest
import timm
import torch
from helpers import randomise
from hub_helpers import MODEL_KWARGS, SMALL, SOURCE, train
from hub_server import HUB
from safetensors.torch import save

import timm_rla_cli as cli


@pytest.fixture
def hub(monkeypatch):
    """The server, empty; between tries the client does not wait."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    HUB.reset()
    return HUB


@pytest.fixture
def gone():
    """Call it, and connections to the server are refused."""
    stopped = []

    def stop():
        stopped.append(HUB)
        HUB.stop()

    yield stop
    if stopped:
        HUB.start()


@pytest.fixture(scope='session')
def source():
    torch.manual_seed(0)
    return randomise(timm.create_model('resnet18', **SMALL)).eval()


@pytest.fixture
def hosted(hub, source):
    hub.add(SOURCE, model__safetensors=save(source.state_dict()))
    return hub


@pytest.fixture(scope='session')
def runs(image_folder, tmp_path_factory):
    """Two epochs each: one run without EMA weights, one that measured them, one that has but did not measure them."""
    output = tmp_path_factory.mktemp('runs')
    common = [*MODEL_KWARGS, '--workers', '0', '--epochs', '2', '--mixup', '0.2']
    ema = ['--model-ema', '--model-ema-decay', '0.5']
    result = types.SimpleNamespace(
        plain=train(image_folder, output / 'plain', *common),
        ema=train(image_folder, output / 'ema', *common, *ema),
        cpu=train(image_folder, output / 'cpu', *common, *ema, '--model-ema-force-cpu'),
    )
    (result.plain / 'curves.png').write_bytes(b'picture')
    return result


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; returns its line of error."""

    def run(*argv):
        assert cli.main(list(map(str, argv))) == 2
        err = capsys.readouterr().err
        assert 'Traceback' not in err
        last = err.strip().splitlines()[-1]
        assert last.startswith(f'timm-rla {argv[0]}: error: '), err
        return last

    return run
