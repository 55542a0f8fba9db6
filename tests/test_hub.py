"""Weights from and to a Hub on loopback: the same logits at the other end, or an error that leaves no trace."""
import json
import os
import re
import subprocess
import sys
import time
import types

import pytest
import safetensors
import timm
import torch
import yaml
from hub_server import HUB
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save
from test_train import load, train
from test_warm_start import randomize

from timm_rla import cli
from timm_rla.train.resume import read_summary

SOURCE = 'timm/resnet18.a1_in1k'
SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
WEIGHTS = 'model.safetensors'
ORIGIN = 'org/tiny'


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


@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    return randomize(timm.create_model('resnet18', **SMALL)).eval()


@pytest.fixture
def hosted(hub, source):
    hub.add(SOURCE, model__safetensors=save(source.state_dict()))
    return hub


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


def pickled(state_dict, path):
    torch.save(state_dict, path)
    return path.read_bytes()


# Download


def test_default_tag_in_full_size(hub, tmp_path):
    torch.manual_seed(0)
    source = randomize(timm.create_model('resnet18')).eval()
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
    model = randomize(timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), context='gmp')).eval()
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


# Publishing

MODEL_KWARGS = ['--model-kwargs', 'layers=(1,1,1)', 'context=gmp', 'hidden_dim=2']


@pytest.fixture(scope='module')
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


def export(checkpoint, directory, *options):
    assert cli.main(['export', str(checkpoint), str(directory), *options]) == 0
    return directory


def trained(checkpoint, key='state_dict'):
    model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1), context='gmp', hidden_dim=2)
    model.load_state_dict(load(checkpoint)[key])
    return model.eval()


def recipe(card):
    return yaml.safe_load(re.search('```yaml\n(.*?)```', card, re.S).group(1))


def metrics(folder):
    data = ModelCard.load(folder / 'README.md').data
    return {result.metric_type: result.metric_value for result in data.eval_results or ()}


def percentages(folder):
    """Accuracies in the text of the card, as they are written there."""
    return re.findall(r'([\d.]+) % ', (folder / 'README.md').read_text())


@pytest.fixture(scope='module')
def exported(runs, tmp_path_factory):
    return export(runs.plain / 'last.pth.tar', tmp_path_factory.mktemp('exported') / 'new' / 'folder')


def test_export_holds_no_pickle(runs, exported):
    assert sorted(p.name for p in exported.iterdir()) == ['README.md', 'config.json', 'curves.png', WEIGHTS]
    assert (exported / 'curves.png').read_bytes() == b'picture'
    tensors, state_dict = load_file(exported / WEIGHTS), load(runs.plain / 'last.pth.tar')['state_dict']
    assert tensors.keys() == state_dict.keys() and all(torch.equal(tensors[key], state_dict[key]) for key in tensors)
    assert [p.name for p in exported.parent.iterdir()] == ['folder']  # nothing temporary is left


def reopened(hub, folder, cache):
    hub.add(ORIGIN, **{p.name.replace('.', '__'): p.read_bytes() for p in folder.iterdir()})
    return create(cache, f'hf-hub:{ORIGIN}')


@pytest.mark.parametrize('source', ['hf-hub', 'local-dir'])
def test_export_loads_with_timm(hub, runs, exported, tmp_path, source):
    if source == 'hf-hub':
        model = reopened(hub, exported, tmp_path)
    elif timm.__version__ == '1.0.21':
        pytest.skip('reads every file as a pickle')
    else:
        model = timm.create_model(f'local-dir:{exported}', pretrained=True).eval()
    assert_same_logits(model, trained(runs.plain / 'last.pth.tar'), 8)
    assert model.num_classes == 10
    data_config = timm.data.resolve_model_data_config(model)
    assert tuple(data_config['input_size']) == (3, 8, 8)
    config = json.loads((exported / 'config.json').read_text())
    assert config['architecture'] == 'rla_resnet20_cifar'
    assert config['model_args'].items() >= dict(layers=[1, 1, 1], context='gmp', hidden_dim=2).items()
    assert not config['model_args'].keys() & {'num_classes', 'in_chans'}  # transformers gives them itself


@pytest.mark.parametrize('name', ['checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar'])
def test_card(runs, tmp_path, name):
    folder = export(runs.plain / name, tmp_path / 'out')
    card = (folder / 'README.md').read_text()
    row = read_summary(runs.plain)[0 if '-0' in name else 1]
    assert percentages(folder) == [f'{row["eval_top1"]:.2f}', f'{row["eval_top5"]:.2f}']
    assert f'{row["eval_loss"]:.4f}' in card and f'epoch {int(row["epoch"]) + 1} ' in card
    assert '`rla_resnet20_cifar`' in card and '3 x 8 x 8' in card and '](curves.png)' in card
    assert f'{sum(p.numel() for p in trained(runs.plain / name).parameters()):,}' in card
    options = recipe(card)
    assert options['model'] == 'rla_resnet20_cifar' and options['lr'] == 0.05 and options['mixup'] == 0.2
    assert options['model_kwargs'] == dict(layers=[1, 1, 1], context='gmp', hidden_dim=2)
    assert not options.keys() & {'data_dir', 'output', 'experiment', 'device', 'workers'}
    assert str(runs.plain.parent) not in card


def test_card_says_only_what_is_known(runs, exported, tmp_path):
    data = ModelCard.load(exported / 'README.md').data
    assert data.license is data.datasets is data.eval_results is None
    assert data.library_name == 'timm' and data.pipeline_tag == 'image-classification' and 'timm_rla' in data.tags
    folder = export(runs.plain / 'last.pth.tar', tmp_path / 'out', '--dataset-name', 'digits', '--license', 'mit')
    data = ModelCard.load(folder / 'README.md').data
    assert data.license == 'mit' and data.datasets == ['digits']
    row = read_summary(runs.plain)[1]
    assert metrics(folder) == {'accuracy': pytest.approx(row['eval_top1'], abs=1e-3),
                               'accuracy_top5': pytest.approx(row['eval_top5'], abs=1e-3)}


def test_card_without_a_summary(runs, tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes((runs.plain / 'last.pth.tar').read_bytes())
    folder = export(tmp_path / 'last.pth.tar', tmp_path / 'out', '--dataset-name', 'digits')
    assert not percentages(folder) and not metrics(folder)


@pytest.mark.parametrize('run, use_ema, measured', [
    ('plain', False, True), ('ema', False, False), ('ema', True, True), ('cpu', False, True), ('cpu', True, False)])
def test_weights_and_accuracy_belong_together(runs, tmp_path, run, use_ema, measured):
    checkpoint = getattr(runs, run) / 'last.pth.tar'
    options = ['--dataset-name', 'digits'] + ['--use-ema'] * use_ema
    folder = export(checkpoint, tmp_path / 'out', *options)
    tensors = load_file(folder / WEIGHTS)
    content = load(checkpoint)
    expected = content['state_dict_ema' if use_ema else 'state_dict']
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    if run != 'plain':
        assert not torch.equal(content['state_dict_ema']['fc.weight'], content['state_dict']['fc.weight'])
    assert bool(percentages(folder)) == bool(metrics(folder)) == measured
    assert ('moving average' in (folder / 'README.md').read_text()) == use_ema


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


def test_export_into_a_folder_that_is_not_empty(runs, tmp_path, fails):
    (tmp_path / 'mine.txt').write_text('mine')
    for path in (tmp_path, tmp_path / 'mine.txt'):
        assert 'not an empty folder' in fails('export', runs.plain / 'last.pth.tar', path)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt'] and (tmp_path / 'mine.txt').read_text() == 'mine'


def test_export_into_an_empty_folder(runs, tmp_path):
    (tmp_path / 'out').mkdir()
    assert (export(runs.plain / 'last.pth.tar', tmp_path / 'out') / WEIGHTS).is_file()


def without(key):
    def change(content):
        del content[key]
    return change


def of_another(content):
    content['state_dict'] = timm.create_model('rla_resnet20_cifar').state_dict()


@pytest.mark.parametrize('change, options, words', [
    (without('args'), [], 'not of a training run'),
    (without('state_dict'), [], 'CHECKPOINT'),
    (of_another, [], 'weights of another network'),
    (None, ['--use-ema'], 'holds no EMA weights'),
    ('noise', [], 'CHECKPOINT'),
    ('nothing', [], 'no such file'),
], ids=['no args', 'no weights', 'other weights', 'no EMA', 'noise', 'no file'])
def test_checkpoint_that_cannot_be_exported(runs, tmp_path, fails, change, options, words):
    path = tmp_path / 'checkpoint.pth.tar'
    if change == 'noise':
        path.write_bytes(b'noise')
    elif change != 'nothing':
        content = load(runs.plain / 'last.pth.tar')
        if change:
            change(content)
        torch.save(content, path)
    assert words in fails('export', path, tmp_path / 'out', *options)
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_other_classes_channels_and_size(hub, tmp_path, image_folder):
    options = ['--in-chans', '1', '--num-classes', '12', '--workers', '0', '--epochs', '1', *MODEL_KWARGS]
    run = train(image_folder, tmp_path, *options)
    model = reopened(hub, export(run / 'last.pth.tar', tmp_path / 'out'), tmp_path / 'cache')
    expected = timm.create_model(
        'rla_resnet20_cifar', layers=(1, 1, 1), context='gmp', hidden_dim=2, in_chans=1, num_classes=12).eval()
    expected.load_state_dict(load(run / 'last.pth.tar')['state_dict'])
    assert torch.equal(model(images(8, 1)), expected(images(8, 1)))


def test_source_of_a_warm_start_is_not_in_the_export(hosted, image_folder, tmp_path, monkeypatch):
    """Weights that were trained on have another data set, licence and paper than those that they began with."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    run = train(image_folder, tmp_path, '--model', 'rla_resnet18', '--pretrained', '--workers', '0', '--epochs', '1',
                '--img-size', '32', '--model-kwargs', *(f'{key}={value}' for key, value in SMALL.items()))
    hosted.requests.clear()
    folder = export(run / 'last.pth.tar', tmp_path / 'out')
    assert not hosted.requests
    assert_same_logits(reopened(hosted, folder, tmp_path / 'cache'), trained_18(run), 32)
    text = (folder / 'config.json').read_text() + (folder / 'README.md').read_text()
    assert not re.search('a1_in1k|apache|arxiv|hf_hub_id|imagenet', text, re.I)
    assert recipe((folder / 'README.md').read_text())['pretrained'] is True


def trained_18(run):
    model = timm.create_model('rla_resnet18', num_classes=10, **SMALL)
    model.load_state_dict(load(run / 'last.pth.tar')['state_dict'])
    return model.eval()


# Push

DESTINATION = 'someone/rla-digits'
NAMES = {'README.md', 'config.json', 'curves.png', WEIGHTS}


@pytest.fixture(params=['lfs', 'xet'])
def client(request, hub, monkeypatch):
    """With and without hf_xet, which the client takes for the upload of folders too; no file here is for Xet."""
    if request.param == 'xet':
        pytest.importorskip('hf_xet')
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
        monkeypatch.setattr('hub_server.LARGE', ())
    return hub


def push(run, *options):
    return ['push', str(run / 'last.pth.tar'), DESTINATION, *options]


def test_push_and_load(client, runs, tmp_path, capsys):
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    repo = client.repos[DESTINATION]
    assert capsys.readouterr().out.splitlines()[-1] == f'{client.url}/{DESTINATION}/commit/{repo.branches["main"]}'
    assert repo.files().keys() == NAMES and len(repo.commits) == 2  # the empty one, and one with all of it
    assert_same_logits(create(tmp_path, f'hf-hub:{DESTINATION}'), trained(runs.plain / 'last.pth.tar'), 8)
    card = repo.files()['README.md'].decode()
    assert f"'hf-hub:{DESTINATION}'" in card and '# rla-digits' in card


def test_push_again(client, runs):
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    first = dict(client.repos[DESTINATION].commits)
    client.requests.clear()
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    assert client.repos[DESTINATION].commits == first
    assert not client.count('^PUT|/commit/')
    assert cli.main(push(runs.ema, '--token', 'hf_x')) == 0  # other weights
    assert len(client.repos[DESTINATION].commits) == len(first) + 1


def test_dry_run(hub, runs, capsys):
    assert cli.main(push(runs.plain, '--dry-run')) == 0
    out = capsys.readouterr().out
    assert not hub.requests and not hub.repos
    assert all(name in out for name in NAMES) and f'# {DESTINATION.split("/")[1]}' in out


@pytest.mark.parametrize('pattern, status, words', [
    ('POST /api/repos/create', '401', '401'),
    ('POST /api/repos/create', '403', '403'),
    ('POST .*/preupload/', '500', '500'),
    ('POST .*/preupload/', '401 RepoNotFound', 'authenticated'),
    ('PUT /lfs/', '500', WEIGHTS),
    ('POST .*/commit/', '500', '500'),
    ('POST .*/commit/', '403', '403'),
], ids=lambda value: value.replace('POST ', ''))
def test_push_that_fails(client, runs, fails, pattern, status, words):
    if 'lfs' in pattern and not constants.HF_HUB_DISABLE_XET:
        pytest.skip('no file is large there')
    client.fail(pattern, status)
    line = fails(*push(runs.plain, '--token', 'hf_x'))
    assert DESTINATION in line and 'nothing was published' in line and words in line
    assert DESTINATION not in client.repos or not client.repos[DESTINATION].files()
    client.faults.clear()
    assert cli.main(push(runs.plain, '--token', 'hf_x')) == 0
    assert client.repos[DESTINATION].files().keys() == NAMES


def test_push_with_the_server_gone(client, runs, fails, gone):
    gone()
    assert 'nothing was published' in fails(*push(runs.plain, '--token', 'hf_x'))


def test_push_in_offline_mode(hub, runs, fails, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'offline mode' in fails(*push(runs.plain, '--token', 'hf_x'))
    assert not hub.requests


@pytest.mark.parametrize('repo_id', ['a/b/c', 'a b/c', 'a/..', 'a/b.git'])
def test_push_to_a_bad_name(hub, runs, fails, repo_id):
    assert repo_id in fails('push', runs.plain / 'last.pth.tar', repo_id, '--token', 'hf_x')
    assert not hub.repos


def test_push_of_no_checkpoint(hub, tmp_path, fails):
    assert 'no such file' in fails('push', tmp_path / 'no.pth', DESTINATION)
    assert not hub.requests


def test_transformers(exported, runs):
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
    logits = model(pixel_values=images(8)).logits
    assert torch.equal(logits, trained(runs.plain / 'last.pth.tar')(images(8)))
    assert type(model.timm_model).__module__.startswith('timm_rla')
