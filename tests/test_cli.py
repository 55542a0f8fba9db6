"""The command line: bad input is one line with the bad value, exit code 2, and leaves nothing behind."""
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import run_without_reader
from timm.models import create_model

import timm_rla_cli as cli
from timm_rla.common.options import parse
from timm_rla.train.options import UNSUPPORTED, train_parser

BASE = ['--device', 'cpu', '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--img-size', '8',
        '--batch-size', '16', '--epochs', '1', '--workers', '0']


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """Run a command that must fail; returns its line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, written=False):
        assert cli.main(list(map(str, argv))) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        errors = [line for line in lines if 'error:' in line]
        assert len(errors) == 1 and lines[-1] == errors[0] and 'Traceback' not in captured.err, captured.err
        if not written:
            assert not (tmp_path / 'output').exists()
        return errors[0]

    return run


@pytest.mark.parametrize('options, words', [
    (['--model', 'rla_resnet5'], ['rla_resnet5', 'rla_resnet50']),
    (['--model', 'xyzzy'], ['xyzzy', 'list_models']),
    (['--model-kwargs', 'context=gup'], ['gup', 'gap', 'gmp', 'gap_mlp', 'gmp_mlp']),
    (['--model-kwargs', 'context_dim=0'], ['context_dim', '0']),
    (['--model-kwargs', 'hidden_dim=4', 'reduction=3'], ['reduction', '3', '4']),
    (['--model-kwargs', 'contxt=gap'], ['contxt', 'context, context_dim, hidden_dim, reduction']),
    (['--model-kwargs', 'attn_layer=sea'], ['sea']),
    (['--opt', 'sdg'], ['sdg', 'sgd']),
    (['--model', 'rla_resnet20_cifar.foo'], ['--model rla_resnet20_cifar.foo', 'foo']),
    (['--img-size', '10000'], ['--img-size 10000', 'from 1 to 8192']),
    (['--model-kwargs', 'features_only=True'], ['--model-kwargs features_only', 'not of the architecture']),
    (['--model-kwargs', 'drop_rate=x'], ["--model-kwargs: drop_rate 'x'", 'from 0 to 1']),
    (['--model-kwargs', 'device=meta'], ['--model-kwargs device', 'not of the architecture']),
    (['--model-kwargs', 'num_classes=3'], ['--model-kwargs num_classes', 'an option of its own']),
    (['--lr', '1e99'], ['--lr 1e+99', 'at most 1e+12']),
    (['--epochs', '1' + 21 * '0'], ['--epochs 1000000000000000000000', 'at most 1e+12']),
    (['--workers', '100000'], ['--workers 100000', 'from 0 to 1024']),
    (['--layer-decay', '1.5'], ['--layer-decay 1.5', 'from 0 to 1']),
    (['--device-modules', ''], ["--device-modules ''"]),
    (['--cutmix-minmax', '0.5', '0.5'], ['--cutmix-minmax 0.5 0.5', 'the least and the largest']),
    (['--experiment', '..'], ['--experiment ..', 'inside of --output']),
    (['--experiment', '/tmp/x'], ['--experiment /tmp/x', 'inside of --output']),
    (['--sched', 'cosin'], ['cosin', 'cosine', 'multistep']),
    (['--device', 'cuda:99'], ['cuda:99']),
    (['--device', 'foo'], ['--device foo: no such device here; there are cpu']),
    (['--device', ''], ["--device '': no such device here; there are cpu"]),
    (['--device', 'cpu:3'], ['--device cpu:3: no such device here']),
    (['--device', 'meta'], ['--device meta: no such device here']),
    (['--crop-pct', '95'], ['--crop-pct 95.0: must be from 0.1 to 2']),
    (['--crop-pct', '1e-9'], ['--crop-pct 1e-09: must be from 0.1 to 2']),
    (['--model-kwargs', 'layers'], ["'layers' is not KEY=VALUE"]),
    (['--model-kwargs', 'layers='], ["'layers=' is not KEY=VALUE"]),
    (['--model-kwargs', 'layers=(1,1'], ['(1,1 is no list or tuple']),
    (['--opt-kwargs', 'nesterov'], ["'nesterov' is not KEY=VALUE"]),
    (['--interpolation', 'linear'], ['--interpolation linear', 'bicubic', 'did you mean bilinear']),
    (['--mean', '0.5', '0.5'], ['--mean 0.5 0.5: 2 numbers for 3 channels']),
    (['--std', '1', '1', '1', '1'], ['--std 1.0 1.0 1.0 1.0: 4 numbers for 3 channels']),
    (['--scale', '0.5'], ['--scale 0.5: must be two numbers']),
    (['--cutmix-minmax', '0.8', '0.2'], ['--cutmix-minmax 0.8 0.2: must be two numbers']),
    (['--config'], ['--config', 'expected one argument']),
    (['--config', ''], ["--config '': is empty"]),
    (['--data-dir', ''], ["--data-dir '': is empty"]),
    (['--data-dir', 'a' * 5000], ['--data-dir aaa', 'File name too long']),
    (['--num-classes', '5'], ['5', '10']),
    (['--batch-size', '4096'], ['4096', '80']),
    (['--train-crop-mode', 'crop'], ['crop', 'rrc', 'pad']),
    (['--eval-metric', 'top2'], ['top2', 'top1']),
    (['--epochs', 'ten'], ['ten', 'int']),
    (['--lernrate', '1'], ['--lernrate']),
    (['--kd-model-name', 'resnet18'], ['--kd-model-name', 'train.py']),
    (['--torchscript'], ['--torchscript', 'train.py']),
    (['--data-dir', 'nowhere'], ['nowhere']),
    (['--train-split', 'nosuch'], ['nosuch', 'train', 'validation']),
    (['--dataset', 'torch/cifer10'], ['torch/cifer10']),
    (['--resume', 'no.pth'], ['no.pth']),
    (['--resume', 'auto'], ['--experiment']),
    (['--initial-checkpoint', 'no.pth'], ['no.pth']),
    (['--pretrained-path', 'no.pth'], ['no.pth']),
    (['--config', 'no.yaml'], ['no.yaml']),
    (['--device-modules', 'nosuchmodule'], ['nosuchmodule']),
], ids=lambda v: ' '.join(v) if v and v[0].startswith('--') else '')
def test_bad_option(fails, image_folder, options, words):
    line = fails('train', *BASE, '--data-dir', image_folder, *options)
    assert line.startswith('timm-rla train: error: ')
    assert all(word in line for word in words), line


@pytest.mark.parametrize('config, words', [
    ({'lernrate': 1}, ['lernrate']),
    ({'kd_model_name': 'resnet18'}, ['kd_model_name', 'train.py']),
    ({'epochs': [1]}, ['epochs', '[1]']),
    ({'amp': 'yes'}, ['amp', 'yes', 'bool']),
    ({'lr': 'fast'}, ['fast']),
    ({'clip_mode': 'hard'}, ['hard', 'norm', 'agc']),
    ({'model_kwargs': 'context=gap'}, ['model_kwargs', 'context=gap']),
    ({'opt': None}, ['opt: null is not of type str']),
    ({'seed': None}, ['seed: null is not of type int']),
    ({'clip_mode': None}, ['clip_mode: null is not one of norm']),
    ({'mixup': None}, ['mixup: null is not of type float']),
    ({'resume': True}, ['resume: True is not of type str']),
    ({'epochs': True}, ['epochs: True is not of type int']),
    ({'mean': [0.5, None, 0.5]}, ['mean', 'is not of type list of float']),
    ({'decay_milestones': [True]}, ['decay_milestones: [True] is not of type list of int']),
    ({'scale': []}, ['scale', 'two numbers']),
    ({'lr_noise': []}, ['lr_noise []', 'at least 0']),
    ({'experiment': 'a\0b'}, ['null']),
    ({'input_size': [3, 8]}, ['input_size: [3, 8] is not of type list of int, 3 of them']),
    (['epochs'], ['mapping']),
], ids=str)
def test_bad_config(fails, tmp_path, image_folder, config, words):
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(config))
    line = fails('train', *BASE[:6], '--data-dir', image_folder, '--config', 'c.yaml')
    assert all(word in line for word in words), line


def test_null_is_what_is_not_given(tmp_path):
    names = ('lr', 'crop_pct', 'mean', 'clip_grad', 'data_dir')
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(dict.fromkeys(names)))
    args = parse(train_parser(), ['--config', str(tmp_path / 'c.yaml')])
    assert all(getattr(args, name) is None for name in names)


@pytest.mark.parametrize('text, name', [
    ('lr: 0.1\nepochs: 3\nlr: 0.5\n', 'lr'), ('model_kwargs: {context: gap, context: gmp}\n', 'context')])
def test_config_says_something_twice(fails, tmp_path, text, name):
    (tmp_path / 'c.yaml').write_text(text)
    assert f'--config c.yaml: {name} stands there twice' in fails('train', '--config', 'c.yaml')


@pytest.mark.parametrize('argv, words', [
    (['predict', ''], "IMAGE '': is empty"),
    (['predict', 'a.png', '--csv', ''], "--csv '': is empty"),
    (['list', ''], "PATTERN '': is empty"),
    (['validate', '--confusion', ''], "--confusion '': is empty"),
    (['validate', '--results-file', ''], "--results-file '': is empty"),
    (['freeze', ''], "CHECKPOINT '': is empty"),
    (['export', 'a.pth', ''], "DIR '': is empty"),
    (['curves', ''], "RUN '': is empty"),
    (['gradcam', 'a' * 5000], 'File name too long'),
    (['curves', 'a' * 5000], 'File name too long'),
    (['export', 'c.pth', 'a' * 300], 'File name too long'),
    (['validate', 'a', '--data-dir', 'b', '--model', 'resnet20_cifar'], 'DIR a: is another folder than --data-dir b'),
    (['validate', '--model', 'resnet20_cifar', '--crop-mode', 'centre'], '--crop-mode centre: no such way; there are'),
    (['validate', '--model', 'resnet20_cifar', '--use-ema'], '--use-ema: without a checkpoint'),
    (['gradcam', 'a', '--model', 'resnet20_cifar', '--baseline-checkpoint', 'b'], '--baseline-checkpoint b: no such'),
    (['benchmark', '--seconds', 'inf'], '--seconds inf'),
    (['benchmark', '--model', 'resnet18', '--device', 'foo'], '--device foo: no such device here; there are cpu'),
], ids=lambda value: ' '.join(value)[:30] if isinstance(value, list) else '')
def test_bad_words(fails, argv, words):
    device = ['--device', 'cpu'] if argv[0] in ('validate', 'gradcam') else []
    assert words in fails(*argv, *device)


def test_config_not_yaml(fails, tmp_path):
    (tmp_path / 'c.yaml').write_text('a: [1')
    assert 'c.yaml' in fails('train', '--config', 'c.yaml')


def test_unsupported_options_at_their_defaults_are_accepted(tmp_path):
    """As they stand in the args.yaml that timm's own script writes."""
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**UNSUPPORTED, 'epochs': 7}))
    args = parse(train_parser(), ['--config', str(tmp_path / 'args.yaml')])
    assert args.epochs == 7 and not set(UNSUPPORTED) & set(vars(args))


def test_command_line_is_above_config(tmp_path):
    (tmp_path / 'c.yaml').write_text('epochs: 7\nlr: 1e-3\nmodel_kwargs: {context: gmp}\n')
    args = parse(train_parser(), ['-c', str(tmp_path / 'c.yaml'), '--epochs', '9'])
    assert (args.epochs, args.lr, args.model_kwargs) == (9, 1e-3, {'context': 'gmp'})


@pytest.mark.parametrize(
    'folders', [[], ['train'], ['train/a', 'validation/a']], ids=['empty', 'no split', 'no images'])
def test_bad_folder(fails, tmp_path, folders):
    (tmp_path / 'images').mkdir()
    for folder in folders:
        (tmp_path / 'images' / folder).mkdir(parents=True)
    assert 'images' in fails('train', *BASE, '--data-dir', 'images')


def copy_folder(image_folder, target):
    import shutil
    shutil.copytree(image_folder, target)
    return target


def test_classes_of_splits_differ(fails, tmp_path, image_folder):
    data = copy_folder(image_folder, tmp_path / 'images')
    (data / 'validation' / '3').rename(data / 'validation' / '2b')
    line = fails('train', *BASE, '--data-dir', data)
    assert "'2b'" in line and 'class-map' in line


@pytest.mark.parametrize('content', [b'', b'no image', None], ids=['empty', 'text', 'truncated'])
@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_image(fails, tmp_path, image_folder, content, workers):
    data = copy_folder(image_folder, tmp_path / 'images')
    bad = sorted((data / 'train' / '3').iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:80] if content is None else content)
    line = fails('train', *BASE, '--data-dir', data, '--workers', workers, '--batch-size', '80', written=True)
    assert str(bad) in line
    assert not multiprocessing.active_children()  # the loader's workers have ended


def checkpoint(path, model, **kwargs):
    torch.save({'state_dict': create_model(model, **kwargs).state_dict()}, path)


@pytest.mark.parametrize('option, other, words', [
    ('--resume', 'resnet20_cifar', 'lacks: layer1.0.attention.fc1.weight'),
    ('--initial-checkpoint', 'seresnet20_cifar', 'unexpected layer1.0.se'),
])
def test_wrong_checkpoint_says_what_differs(fails, tmp_path, image_folder, option, other, words):
    options = ['train', *BASE, '--data-dir', image_folder, option, 'c.pth']
    checkpoint(tmp_path / 'c.pth', other, layers=(1, 1, 1))
    line = fails(*options)
    assert 'c.pth' in line and words in line
    checkpoint(tmp_path / 'c.pth', 'rla_resnet20_cifar', layers=(1, 1, 1), hidden_dim=8)
    assert 'layer1.0.attention.fc1.weight has shape [8, 8], the model [4, 4]' in fails(*options)
    checkpoint(tmp_path / 'c.pth', 'rla_resnet20_cifar', layers=(2, 1, 1))
    assert 'layer1.1' in fails(*options)
    (tmp_path / 'c.pth').write_bytes(b'PK not a checkpoint')
    assert 'c.pth' in fails(*options)


def test_checkpoint_with_code_does_not_run(fails, tmp_path, image_folder):
    class Evil:
        def __reduce__(self):
            return (exec, (f'open({str(tmp_path / "ran")!r}, "w")',))

    torch.save({'state_dict': Evil()}, tmp_path / 'c.pth')
    for option in ('--resume', '--initial-checkpoint'):
        assert 'c.pth' in fails('train', *BASE, '--data-dir', image_folder, option, 'c.pth')
    assert 'c.pth' in fails('validate', '--device', 'cpu', '--data-dir', image_folder, '--checkpoint', 'c.pth')
    assert not (tmp_path / 'ran').exists()


def test_validate_needs_a_model(fails, image_folder):
    assert '--model' in fails('validate', '--device', 'cpu', '--data-dir', image_folder)


def test_validate_takes_a_folder_of_classes(image_folder, capsys):
    """As timm's script: the folder of a split itself will do."""
    options = ['--device', 'cpu', '--model', 'resnet20_cifar', '--img-size', '8', '--workers', '0']
    results = []
    for folder in (image_folder, image_folder / 'validation'):
        torch.manual_seed(0)
        assert cli.main(['validate', *options, '--data-dir', str(folder)]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]


def test_nobody_reads_what_is_printed():
    assert run_without_reader('import timm_rla_cli; sys.exit(timm_rla_cli.main(["list"]))') == (141, b'')


def test_no_such_command(capsys):
    assert cli.main(['trian']) == 2
    assert 'did you mean train?' in capsys.readouterr().err
    assert cli.main(['xyzzy']) == 2
    assert 'train, validate' in capsys.readouterr().err


@pytest.mark.parametrize('argument, code', [('--help', 0), ('--version', 0), ('trian', 2)])
def test_help_does_without_torch(argument, code):
    """And so answers at once."""
    script = f'import sys, timm_rla_cli; code = timm_rla_cli.main([{argument!r}]); ' \
             'print([m for m in sys.modules if m in ("torch", "timm", "timm_rla", "numpy")]); sys.exit(code)'
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert run.returncode == code and run.stdout.splitlines()[-1] == '[]'


def test_environment_variable_that_is_wrong():
    script = 'import sys, timm_rla_cli; sys.exit(timm_rla_cli.main(["list"]))'
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                         env={**os.environ, 'TIMM_RLA_FUSED': 'On', 'TIMM_RLA_AUTOLOAD': '0'})
    assert run.returncode == 2
    assert run.stderr.strip() == "timm-rla: error: TIMM_RLA_FUSED must be one of off, on, triton, not 'On'"


@pytest.mark.parametrize('command', [['curves', 'x'], ['train', '--data-dir', 'x'], ['train', '--config', 'x']])
def test_what_may_not_be_read_is_a_line(fails, monkeypatch, tmp_path, command):
    def denied(*args, **kwargs):
        raise PermissionError(13, 'Permission denied', 'x')

    (tmp_path / 'x').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('os.scandir', denied)
    monkeypatch.setattr('pathlib.Path.is_file', denied)
    assert 'x: Permission denied' in fails(*command)


@pytest.mark.parametrize('command', sorted(cli.COMMANDS))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, '--help'])
    assert e.value.code == 0 and f'usage: timm-rla {command}' in capsys.readouterr().out


@pytest.mark.long
def test_module_is_the_command():
    run = subprocess.run([sys.executable, '-m', 'timm_rla'], capture_output=True, text=True)
    assert run.returncode == 0 and all(command in run.stdout for command in cli.COMMANDS)


def test_import_is_light():
    """Neither matplotlib nor scikit-learn, nor any training code, comes with the package itself."""
    code = 'import sys, timm_rla; print([m for m in sys.modules if m.split(".")[0] in ("matplotlib", "sklearn") ' \
           'or m.startswith(("timm_rla.train", "timm_rla.common"))])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
