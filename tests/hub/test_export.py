"""A checkpoint as a folder: timm and transformers load it to the same logits, and its card says what is known."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_helpers import (
    MODEL_KWARGS,
    SMALL,
    WEIGHTS,
    assert_same_logits,
    export,
    images,
    load,
    reopened,
    train,
    trained,
)
from huggingface_hub import ModelCard, constants
from safetensors import SafetensorError
from safetensors.torch import load_file

import timm_rla_cli as cli
from timm_rla.common import loaders
from timm_rla.common.summary import read_summary


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


@pytest.mark.parametrize('link', [False, True])
def test_export_into_the_current_or_a_linked_folder(runs, exported, tmp_path, monkeypatch, link):
    """The current one, or one behind a link, which stay."""
    folder = tmp_path / 'folder'
    folder.mkdir()
    if link:
        (tmp_path / 'link').symlink_to(folder)
    before = folder.stat().st_ino
    monkeypatch.chdir(folder)
    export(runs.plain / 'last.pth.tar', tmp_path / 'link' if link else Path('.'))
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in exported.iterdir())
    assert folder.stat().st_ino == before


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
    content = torch.load(runs.plain / 'last.pth.tar', weights_only=False)
    del content['summary']  # as of timm's script
    torch.save(content, tmp_path / 'last.pth.tar')
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


def test_export_into_a_folder_that_is_not_empty(runs, tmp_path, fails):
    (tmp_path / 'mine.txt').write_text('mine')
    for path in (tmp_path, tmp_path / 'mine.txt'):
        assert 'not an empty folder' in fails('export', runs.plain / 'last.pth.tar', path)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt'] and (tmp_path / 'mine.txt').read_text() == 'mine'


def test_export_into_an_empty_folder(runs, tmp_path):
    (tmp_path / 'out').mkdir()
    assert (export(runs.plain / 'last.pth.tar', tmp_path / 'out') / WEIGHTS).is_file()


def test_others_may_read_the_weights(runs, tmp_path):
    folder = export(runs.plain / 'last.pth.tar', tmp_path / 'out')
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / 'config.json').stat().st_mode}


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), SafetensorError('No space left on device')])
def test_export_on_a_full_disk(runs, tmp_path, fails, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm_rla.hub.export.save_for_hf', full)
    assert 'No space left on device' in fails('export', runs.plain / 'last.pth.tar', tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_the_card_names_no_folder_of_the_machine(runs, tmp_path):
    content = torch.load(runs.plain / 'last.pth.tar', weights_only=False)
    vars(content['args']).update(initial_checkpoint='/home/me/secret/start.pth', log_wandb=True, wandb_project='secret')
    torch.save(content, tmp_path / 'last.pth.tar')
    card = (export(tmp_path / 'last.pth.tar', tmp_path / 'out') / 'README.md').read_text()
    assert 'secret' not in card and recipe(card)['initial_checkpoint'] == 'start.pth'


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


def test_other_classes_channels_pooling_and_size(hub, tmp_path, image_folder):
    options = ['--in-chans', '1', '--num-classes', '12', '--gp', 'max', '--workers', '0', '--epochs', '1',
               *MODEL_KWARGS]
    run = train(image_folder, tmp_path, *options)
    model = reopened(hub, export(run / 'last.pth.tar', tmp_path / 'out'), tmp_path / 'cache')
    expected = timm.create_model(
        'rla_resnet20_cifar',
        layers=(1, 1, 1),
        context='gmp',
        hidden_dim=2,
        in_chans=1,
        num_classes=12,
        global_pool='max',
    ).eval()
    expected.load_state_dict(load(run / 'last.pth.tar')['state_dict'])
    assert torch.equal(model(images(8, 1)), expected(images(8, 1)))


def as_tuples(config):
    """Sequences are lists where JSON has been."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


@pytest.fixture
def evaluated(monkeypatch):
    """Collects how images of validation are made into the input of a network."""
    found = []

    def create_loader(*args, original=loaders.create_loader, **kwargs):
        if not kwargs['is_training']:
            config = {key: kwargs[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
            found.append(as_tuples(dict(config, crop_mode=kwargs.get('crop_mode') or 'center')))
        return original(*args, **kwargs)

    monkeypatch.setattr(loaders, 'create_loader', create_loader)
    return found


@pytest.mark.long(but=['--img-size 64*', '--input-size*'])
@pytest.mark.parametrize('options', [
    ['--img-size', '224', '--crop-pct', '0.875', '--interpolation', 'bilinear'],  # its own size
    ['--img-size', '224'],
    ['--img-size', '64', '--crop-pct', '0.8', '--mean', '0.5', '--std', '0.4'],
    ['--input-size', '1', '32', '48'],
], ids=' '.join)
def test_export_is_evaluated_as_in_training(image_folder, tmp_path, evaluated, options):
    """Not at the size for testing and the crop of the network without layer attention, 288 and 1.0."""
    model = ['--model', 'rla_resnet18', '--model-kwargs', *(f'{key}={value}' for key, value in SMALL.items())]
    run = train(image_folder, tmp_path, *model, '--workers', '0', '--epochs', '1', *options)
    top1 = read_summary(run)[-1]['eval_top1']
    folder = export(run / 'last.pth.tar', tmp_path / 'out')
    exported = timm.create_model(f'local-dir:{folder}')
    for use_test_size in (False, True):
        config = timm.data.resolve_data_config({}, model=exported, use_test_size=use_test_size)
        assert as_tuples(config) == evaluated[0]

    read = ['--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    sources = [['--checkpoint', str(run / 'last.pth.tar')]]
    if timm.__version__ != '1.0.21':  # which reads every file there as a pickle
        sources.append(['--model', f'local-dir:{folder}', '--pretrained'])
    for source in sources:
        result = tmp_path / 'result.json'
        assert cli.main(['validate', *source, *read, '--results-file', str(result), '--results-format', 'json']) == 0
        assert json.loads(result.read_text())['top1'] == pytest.approx(top1, abs=1e-3)
    assert evaluated == evaluated[:1] * (1 + len(sources))  # in training, and in each validation


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


def test_transformers(exported, runs):
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
    logits = model(pixel_values=images(8)).logits
    assert torch.equal(logits, trained(runs.plain / 'last.pth.tar')(images(8)))
    assert type(model.timm_model).__module__.startswith('timm_rla')
    assert model.config.id2label == {index: str(index) for index in range(10)}  # names of the folders, not LABEL_0
