"""Registration by installation alone: what a user imports, in whatever order, each in a Python of its own."""
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import timm

import timm_rla_autoload

LIST = "print(len(timm.list_models('rla*')) > 20 and timm.create_model('rla_resnet20_cifar').num_classes)"


def python(code, check=True, **environment):
    """Output of some code; the environment variables come on top."""
    result = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()
    return result


def test_entry_point():
    names = [(e.name, e.value) for e in entry_points(group='torch.backends')]
    assert ('timm_rla', 'timm_rla_autoload:install') in names


@pytest.mark.parametrize('imports', [
    'import timm',
    *(pytest.param(imports, marks=pytest.mark.long) for imports in (
        'import torch, timm',
        'import timm_rla, timm',
        'import timm, timm_rla',
        'from timm.models.resnet import resnet18; import timm',
        'import timm_rla.layers; import timm',
        'import timm, importlib, timm_rla; importlib.reload(timm_rla)',
    )),
])
def test_models_are_known(imports):
    result = python(f'{imports}; {LIST}', check=False)
    assert result.returncode == 0 and result.stdout.strip() == '10', result.stderr
    assert 'registry' not in result.stderr  # no warning of timm's about models that are registered twice


def test_torch_alone_imports_nothing_more():
    code = "import sys, torch; print([m for m in sys.modules if m.split('.')[0] in ('timm', 'timm_rla')])"
    assert python(code) == '[]'


@pytest.mark.long
def test_switched_off():
    code = "import timm; print(timm.list_models('rla*')); import timm_rla; print(timm.is_model('rla_resnet50'))"
    assert python(code, TIMM_RLA_AUTOLOAD='0').split() == ['[]', 'True']


@pytest.mark.long
def test_package_missing():
    result = python("import sys; sys.modules['timm_rla'] = None\n"
                    "import timm; print(timm.list_models('rla*'), timm.is_model('resnet50'))", check=False)
    assert result.returncode == 0 and result.stdout.split() == ['[]', 'True']
    assert 'not registered' in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.long
def test_package_broken(tmp_path):
    (tmp_path / 'timm_rla').mkdir()
    (tmp_path / 'timm_rla' / '__init__.py').write_text('raise RuntimeError("broken")')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules.pop('timm_rla', None)\n" \
           "import timm; print(timm.is_model('resnet50'))"
    result = python(code, check=False)
    assert result.stdout.strip() == 'True' and 'RuntimeError: broken' in result.stderr
    assert python(f'{code}', TIMM_RLA_AUTOLOAD='0') == 'True'


@pytest.mark.long
def test_timm_missing():
    code = "import sys; sys.modules['timm'] = None\nimport torch\ntry: import timm\nexcept ImportError: print('none')"
    assert python(code) == 'none'


def test_timm_broken(tmp_path):
    """The error of a broken timm reaches the user as it is."""
    (tmp_path / 'timm' / 'models').mkdir(parents=True)
    (tmp_path / 'timm' / '__init__.py').write_text('')
    (tmp_path / 'timm' / 'models' / '__init__.py').write_text('raise KeyError("oh")')
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch\n' \
           'for _ in range(2):\n    try: import timm.models\n    except KeyError as e: print(e)'
    assert python(code).split() == ["'oh'", "'oh'"]


@pytest.mark.long
def test_another_timm_on_the_path(tmp_path):
    shutil.copytree(Path(timm.__file__).parent, tmp_path / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    code = f'import timm; print(timm.__file__.startswith({str(tmp_path)!r})); {LIST}'
    assert python(code, PYTHONPATH=str(tmp_path)).split() == ['True', '10']


@pytest.mark.long
def test_loader_is_left_as_it_was():
    code = 'import timm.models as m, inspect, sys\n' \
           "assert 'exec_module' not in vars(m.__spec__.loader) and m.__loader__ is m.__spec__.loader\n" \
           "assert inspect.getsource(m)\n" \
           "print([type(f).__module__ for f in sys.meta_path if type(f).__module__ == 'timm_rla_autoload'])"
    assert python(code) == '[]'


@pytest.mark.long
def test_spawned_workers(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('''
import torch
from torch.utils.data import DataLoader, Dataset

class Known(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        import timm
        return timm.is_model('rla_resnet50')

if __name__ == '__main__':
    print([bool(x) for x in DataLoader(Known(), num_workers=1, multiprocessing_context='spawn')])
''')
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.stdout.strip() == '[True, True]', result.stderr


@pytest.mark.long
def test_under_torchrun(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('import os, timm; os.write(1, b"known %d " % timm.is_model("rla_resnet50"))')  # in one piece
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.count('known 1') == 2


def test_install_twice_leaves_one_finder(monkeypatch):
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.delitem(sys.modules, 'timm.models')
    timm_rla_autoload.install()
    timm_rla_autoload.install()
    assert sum(isinstance(finder, timm_rla_autoload._Finder) for finder in sys.meta_path) == 1


def test_install_never_raises(monkeypatch):
    monkeypatch.setattr(sys, 'meta_path', None)
    monkeypatch.delitem(sys.modules, 'timm.models')
    timm_rla_autoload.install()
