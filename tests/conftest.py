"""Fixtures that several test files share; they import torch, which the process that only hands out tests need not."""
import fnmatch
import logging
import shutil
import signal
import sys

import hub_server  # noqa: F401  first of all: it sets what huggingface_hub reads when it is imported
import pytest


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also run the tests that are marked as long')


def is_long(item):
    """True if a test has the mark `long`, unless its parameters match one of the patterns in `long(but=[...])`."""
    mark = item.get_closest_marker('long')
    return mark is not None and not any(
        fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in mark.kwargs.get('but', ()))


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--long'):
        for item in items:
            if is_long(item):
                item.add_marker(pytest.mark.skip(reason='long; make test-all runs it'))


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """Tensors are small here: more threads only get in each other's way."""
    import torch
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """Image folder with all of scikit-learn's digits."""
    from timm_rla.commands.quickstart import write_digits
    return write_digits(tmp_path_factory.mktemp('digits') / 'digits')


@pytest.fixture(scope='session')
def image_folder(digits, tmp_path_factory):
    """Image folder with a few digits: 8 for training and 3 for validation of each class."""
    root = tmp_path_factory.mktemp('data') / 'few'
    for split, count in (('train', 8), ('validation', 3)):
        for folder in sorted((digits / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / split / folder.name)
    return root


@pytest.fixture(scope='session')
def whole_run(image_folder, tmp_path_factory):
    """Folder of a small training run that nothing interrupts, made once for each length and options."""
    from helpers import train
    runs = {}

    def get(epochs, options):
        key = (epochs, *options)
        if key not in runs:
            runs[key] = train(image_folder, tmp_path_factory.mktemp('whole'), '--epochs', str(epochs), *options)
        return runs[key]

    return get


@pytest.fixture(autouse=True)
def fresh_logging():
    """timm's logging set-up adds a handler at every call, on a stream that ends with the test."""
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def forget_compiled():
    """Dynamo counts how often it compiles a function, over all models, and gives up at some number."""
    yield
    if 'torch._dynamo' in sys.modules:
        sys.modules['torch._dynamo'].reset()


@pytest.fixture(autouse=True)
def restore_form():
    """The form of the gated norm that a test has chosen ends with it."""
    from timm_rla.ops.gated_norm import form, set_form
    before = form()
    yield
    set_form(before)


@pytest.fixture
def hangup():
    """SIGHUP, which nohup lets be ignored, as a process has it otherwise."""
    if not hasattr(signal, 'SIGHUP'):
        pytest.skip('no SIGHUP on this platform')
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)
