"""Weights from a Hub on loopback: the same logits at this end, or an error that leaves no trace."""
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors
import timm
import torch
from helpers import randomise
from hub_helpers import ORIGIN, SMALL, SOURCE, WEIGHTS, assert_same_logits, create, files, images
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save

import timm_rla_cli as cli


def pickled(state_dict, path):
    torch.save(state_dict, path)
    return path.read_bytes()


def test_default_tag_in_full_size(hub, tmp_path):
    torch.manual_seed(0)
    source = randomise(timm.create_model('resnet18')).eval()
    hub.add(SOURCE, model__safetensors=save(source.state_dict()))
    assert_same_logits(timm.create_model('rla_resnet18', pretrained=True, cache_dir=tmp_path).eval(), source)


def test_explicit_tag(hosted, source, tmp_path):
    assert_same_logits(create(tmp_path, 'rla_resnet18.backbone_a1_in1k'), source)
    with pytest.raises(RepositoryNotFoundError):  # another tag is another repository
        create(tmp_path, 'rla_resnet18.backbone_a2_in1k')


def test_second_load_sends_nothing_twice(hosted, source, tmp_path):
    for _ in range(2):
        assert_same_logits(create(tmp_path), source)
    assert hosted.count(f'^GET .*{WEIGHTS}') == 1


def test_new_commit_is_downloaded(hosted, source, tmp_path):
    create(tmp_path)
    changed = {key: value + 1 if key == 'fc.bias' else value for key, value in source.state_dict().items()}
    hosted.add(SOURCE, model__safetensors=save(changed))
    assert torch.equal(create(tmp_path).fc.bias, source.fc.bias + 1)


def test_second_load_with_the_server_gone(hosted, source, tmp_path, gone):
    create(tmp_path)
    gone()
    assert_same_logits(create(tmp_path), source)


@pytest.mark.long
def test_offline_mode(hosted, source, tmp_path):
    create(tmp_path / 'cache')
    script = f'''
import timm, torch
from huggingface_hub.errors import LocalEntryNotFoundError
create = lambda cache: timm.create_model('rla_resnet18', pretrained=True, cache_dir=cache, **{SMALL!r}).eval()
torch.save(create('cache')(torch.load('images.pt')), 'logits.pt')
try:
    create('empty')
except LocalEntryNotFoundError:
    print('refused')
'''
    torch.save(images(), tmp_path / 'images.pt')
    hosted.requests.clear()
    result = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=dict(os.environ, HF_HUB_OFFLINE='1'),
                            capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, 'refused\n'), result.stderr
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), source(images()))
    assert not hosted.requests


def test_no_network_and_no_cache(hub, tmp_path, gone):
    gone()
    with pytest.raises(LocalEntryNotFoundError, match='check your connection'):
        create(tmp_path)
    assert not files(tmp_path)


def test_no_such_repository(hub, tmp_path):
    with pytest.raises(RepositoryNotFoundError, match=SOURCE):
        create(tmp_path)
    assert not files(tmp_path)


def test_repository_without_weights(hub, tmp_path):
    hub.add(SOURCE, README__md=b'Nothing here')
    with pytest.raises(EntryNotFoundError):
        create(tmp_path)
    assert not files(tmp_path)


def test_pickle_where_there_is_no_safetensors(hub, source, tmp_path):
    hub.add(SOURCE, pytorch_model__bin=pickled(source.state_dict(), tmp_path / 'a'))
    assert_same_logits(create(tmp_path / 'cache'), source)


def test_pickle_with_the_server_gone(hub, source, tmp_path, gone):
    hub.add(SOURCE, pytorch_model__bin=pickled(source.state_dict(), tmp_path / 'a'))
    create(tmp_path / 'cache')
    gone()
    assert_same_logits(create(tmp_path / 'cache'), source)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_does_not_run(hub, source, tmp_path):
    state_dict = dict(source.state_dict(), code=Code(str(tmp_path / 'ran')))
    hub.add(SOURCE, pytorch_model__bin=pickled(state_dict, tmp_path / 'a'))
    with pytest.raises(Exception, match='[Ww]eights.only'):
        create(tmp_path / 'cache')
    assert not (tmp_path / 'ran').exists()
    torch.load(tmp_path / 'a', weights_only=False)
    assert (tmp_path / 'ran').exists()  # it would have run


@pytest.mark.parametrize('name', [WEIGHTS, 'pytorch_model.bin'])
@pytest.mark.parametrize('kind, error, words', [
    ('cut', Exception, 'closed|incomplete'),
    ('short', OSError, 'should be of size'),
    ('wrong', RuntimeError, '{name} of timm/resnet18.a1_in1k is damaged.*try again'),
])
def test_damaged_on_the_way(hub, source, tmp_path, name, kind, error, words):
    content = save(source.state_dict()) if name == WEIGHTS else pickled(source.state_dict(), tmp_path / 'a')
    hub.add(SOURCE, **{name.replace('.', '__'): content})
    hub.fail(f'GET .*{name}', kind, 6)  # one more than the client tries again
    with pytest.raises(error, match=words.format(name=re.escape(name))):
        create(tmp_path / 'cache')
    assert not files(tmp_path / 'cache')
    hub.faults.clear()
    assert_same_logits(create(tmp_path / 'cache'), source)


def test_connection_that_breaks_once(hosted, source, tmp_path):
    hosted.fail(f'GET .*{WEIGHTS}', 'cut', 1)
    assert_same_logits(create(tmp_path), source)


def test_slow_server(hosted, source, tmp_path):
    hosted.fail(WEIGHTS, 'slow', 2)
    assert_same_logits(create(tmp_path), source)


def test_damaged_in_the_cache(hosted, source, tmp_path):
    create(tmp_path)
    blob = next(p for p in files(tmp_path) if 'blobs' in p.parts)
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match='damaged'):
        create(tmp_path)
    assert_same_logits(create(tmp_path), source)


def share(cache):
    """What Xet makes of a cache: one store for all repositories, under hashes that are not the SHA-256."""
    store = cache / 'blobs' / 'ab' / ('ab' * 32)
    store.parent.mkdir(parents=True)
    blob = next(cache.glob('models--*/blobs/*'))
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    return store


def test_cache_with_a_shared_store(hosted, source, tmp_path):
    create(tmp_path)
    store = share(tmp_path)
    assert_same_logits(create(tmp_path), source)
    assert hosted.count('^GET') == 1
    content = store.read_bytes()
    store.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match='damaged'):
        create(tmp_path)
    assert not files(tmp_path) and not any(p.is_symlink() for p in tmp_path.rglob('*'))
    assert_same_logits(create(tmp_path), source)


@pytest.mark.parametrize('content', [b'\xff' * 1000, b'', b'{}', None], ids=['noise', 'empty', 'short', 'half'])
def test_file_that_was_damaged_before_it_was_uploaded(hub, source, tmp_path, content):
    content = save(source.state_dict())[:50000] if content is None else content
    hub.add(SOURCE, model__safetensors=content)
    with pytest.raises(safetensors.SafetensorError):
        create(tmp_path)
    hub.add(SOURCE, model__safetensors=save(source.state_dict()))
    assert_same_logits(create(tmp_path), source)


def test_weights_of_another_network(hub, tmp_path):
    hub.add(SOURCE, model__safetensors=save(timm.create_model('resnet18', layers=(1, 2, 1, 1)).state_dict()))
    with pytest.raises(RuntimeError, match='neither those of this network'):
        create(tmp_path)


@pytest.mark.parametrize('status, error, words', [
    ('401', HfHubHTTPError, '401'),
    ('401 RepoNotFound', RepositoryNotFoundError, 'Repository Not Found.*authenticated'),
    ('403 GatedRepo', GatedRepoError, 'gated repo'),
    ('500', LocalEntryNotFoundError, 'try again'),
])
def test_status(hosted, source, tmp_path, status, error, words):
    hosted.fail('HEAD', status)
    with pytest.raises(error, match=f'(?s){words}'):
        create(tmp_path)
    assert not files(tmp_path)
    hosted.faults.clear()
    assert_same_logits(create(tmp_path), source)


def test_server_that_recovers(hosted, source, tmp_path):
    hosted.fail('HEAD', '500', 3)
    assert_same_logits(create(tmp_path), source)


def test_failure_after_the_first_half(hosted, source, tmp_path):
    hosted.fail('GET', '500')
    with pytest.raises(HfHubHTTPError, match='500'):
        create(tmp_path)
    assert not files(tmp_path)
    hosted.faults.clear()
    assert_same_logits(create(tmp_path), source)


@pytest.mark.parametrize('fault, words', [
    (('HEAD', '404 RepoNotFound'), SOURCE),
    (('HEAD', '401'), SOURCE),
    (('HEAD', '500'), 'connection'),
    (('GET', 'cut'), f'{WEIGHTS} of {SOURCE}'),
    (('GET', 'wrong'), 'damaged'),
    (None, 'connection'),
], ids=str)
def test_command_line(hosted, image_folder, tmp_path, monkeypatch, capsys, gone, fault, words):
    """Whatever goes wrong is one line, and no run has begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    hosted.fail(*fault) if fault else gone()
    options = ['--model', 'rla_resnet18', '--pretrained', '--data-dir', str(image_folder), '--num-classes', '10',
               '--device', 'cpu', '--img-size', '32', '--workers', '0', '--epochs', '1', '--model-kwargs',
               *(f'{key}={value}' for key, value in SMALL.items())]
    assert cli.main(['train', *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('timm-rla train: error: --model rla_resnet18: ') and words in last
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('command', ['validate', 'predict'])
def test_without_a_checkpoint(hosted, image_folder, tmp_path, monkeypatch, caplog, command):
    """The hosted weights are taken, as by timm's scripts; random ones where none are hosted, which is said."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    data = [str(image_folder / 'validation' / '0')] if command == 'predict' else ['--data-dir', str(image_folder)]
    options = ['--device', 'cpu', '--workers', '0', '--img-size', '32', '--model-kwargs']
    small = [f'{key}={value}' for key, value in SMALL.items()]
    assert cli.main([command, *data, '--model', 'rla_resnet18', *options, *small]) == 0
    assert hosted.count(f'^GET .*{WEIGHTS}') == 1 and 'random weights' not in caplog.text
    assert 'random classifier' not in caplog.text
    assert cli.main([command, *data, '--model', 'rla_resnet18', '--num-classes', '10', *options, *small]) == 0
    assert '--num-classes 10: a random classifier, that of the weights has 1000' in caplog.text
    assert cli.main([command, *data, '--model', 'rla_resnet20_cifar', *options]) == 0
    assert 'rla_resnet20_cifar: random weights' in caplog.text


def test_other_classes_and_channels(hosted, source, tmp_path):
    model = create(tmp_path, num_classes=10, in_chans=1)
    grey = images(channels=1)
    torch.testing.assert_close(
        model.forward_features(grey), source.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert model(grey).shape == (2, 10)


def test_features_only(hosted, source, tmp_path):
    features = create(tmp_path, features_only=True)(images())
    expected = source.forward_intermediates(images(), intermediates_only=True)
    assert len(features) == 5 and all(torch.equal(a, b) for a, b in zip(features, expected))


def rla_checkpoint(hub):
    torch.manual_seed(1)
    model = randomise(timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), context='gmp')).eval()
    config = dict(architecture='rla_resnet20_cifar', num_classes=10, model_args=dict(layers=[1, 1, 1], context='gmp'),
                  pretrained_cfg=dict(input_size=[3, 32, 32], num_classes=10, classifier='fc', first_conv='conv1'))
    hub.add(ORIGIN, model__safetensors=save(model.state_dict()), config__json=json.dumps(config).encode())
    return model


def test_checkpoint_of_an_rla_network(hub, tmp_path):
    model = rla_checkpoint(hub)
    assert_same_logits(create(tmp_path, f'hf-hub:{ORIGIN}'), model, 32)


def test_revision(hub, tmp_path):
    model = rla_checkpoint(hub)
    old = hub.repos[ORIGIN].branches['main']
    hub.add(ORIGIN, model__safetensors=b'')
    assert_same_logits(create(tmp_path, f'hf-hub:{ORIGIN}@{old}'), model, 32)
    with pytest.raises(HfHubHTTPError, match='Revision'):
        create(tmp_path, f'hf-hub:{ORIGIN}@nosuch')


def test_checkpoint_of_an_rla_network_that_is_damaged(hub, tmp_path):
    model = rla_checkpoint(hub)
    hub.fail(f'GET .*{WEIGHTS}', 'wrong', 1)
    with pytest.raises(RuntimeError, match=f'{WEIGHTS} of {ORIGIN} is damaged'):
        create(tmp_path, f'hf-hub:{ORIGIN}')
    assert_same_logits(create(tmp_path, f'hf-hub:{ORIGIN}'), model, 32)
