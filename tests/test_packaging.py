"""Wheel, source distribution and editable installation, each from a copy of the repository and away from it."""
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import timm_rla

ROOT = Path(timm_rla.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / 'setup.cfg').is_file(), reason='needs the repository')


def run(*command, **kwargs):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    target = tmp_path_factory.mktemp('clone') / 'timm_rla'
    keep = shutil.ignore_patterns('.*', 'data', 'output', 'results', '*.egg-info', 'build', 'dist', '__pycache__')
    shutil.copytree(ROOT, target, ignore=keep)
    return target


@pytest.fixture(scope='module')
def wheels(clone, tmp_path_factory):
    """The wheel, and the wheel that the source distribution gives."""
    out = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, clone)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index']
    run(*pip, '--wheel-dir', out / 'again', next(out.glob('*.tar.gz')))
    return next(out.glob('*.whl')), next((out / 'again').glob('*.whl'))


@pytest.fixture(scope='module')
def environment(wheels, tmp_path_factory):
    """An environment with the wheel, which finds its dependencies where those of the tests are."""
    path = tmp_path_factory.mktemp('environment')
    run(sys.executable, '-m', 'venv', path)
    python = path / 'bin' / 'python'
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-index', '--ignore-installed', wheels[0])
    return path / 'bin'


@pytest.mark.long
def test_both_hold_the_same(wheels):
    contents = [sorted(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert contents[0] == contents[1]
    with tarfile.open(next(wheels[0].parent.glob('*.tar.gz'))) as source:
        names = {name.split('/', 1)[-1] for name in source.getnames()}
    assert {'README.md', 'CHANGELOG.md', 'build_backend/backend.py', 'timm_rla/layers.py'} < names
    assert not any(name.startswith('tests') for name in names)  # some would be there, without what they need
    for path in ('timm_rla/recipes/cifar10.yaml', 'timm_rla/reproduce/tables/table1.yaml', 'timm_rla_cli.py',
                 'timm_rla_autoload.py', 'timm_rla/commands/predict.py'):
        assert path in contents[0]


@pytest.mark.long
def test_works_from_another_folder(environment, tmp_path):
    shown = run(environment / 'python', '-c', 'import timm, timm_rla; print(timm_rla.__file__, '
                'timm.is_model("rla_resnet50"))', cwd=tmp_path)
    assert str(environment.parent) in shown and 'True' in shown
    env = dict(os.environ, OMP_NUM_THREADS='1')
    out = run(environment / 'timm-rla', 'quickstart', '--epochs', '1', '--model-kwargs', 'layers=(1,1,1)', cwd=tmp_path,
              env=env)
    assert 'held-out digits' in out and (tmp_path / 'output' / 'quickstart' / 'digits').is_dir()
    assert 'imagenet_paper' in run(environment / 'timm-rla', 'list', 'rla_resnet50', cwd=tmp_path)
    refused = subprocess.run([environment / 'timm-rla', 'train', '--config', 'cifar11'], capture_output=True, text=True,
                             cwd=tmp_path)
    assert refused.returncode == 2 and 'recipes are ' in refused.stderr and ' cifar10, cifar100' in refused.stderr
    assert run(environment / 'timm-rla', '--version', cwd=tmp_path).strip() == timm_rla.__version__


def test_torch_survives_a_moved_clone(clone, tmp_path):
    """An editable installation whose clone is gone: its metadata are there, its code is not."""
    moved = shutil.copytree(clone, tmp_path / 'clone')
    code = f'import sys; sys.path.insert(0, "build_backend"); import backend; backend.build_editable({str(tmp_path)!r})'
    run(sys.executable, '-c', code, cwd=moved)
    site = tmp_path / 'site'
    zipfile.ZipFile(next(tmp_path.glob('*.whl'))).extractall(site)
    shutil.rmtree(moved)
    code = 'import torch, sys; print(sys.modules["timm_rla_autoload"].__file__)'
    shown = run(sys.executable, '-c', code, env=dict(os.environ, PYTHONPATH=str(site)), cwd=tmp_path)
    assert shown.strip() == str(site / 'timm_rla_autoload.py')
