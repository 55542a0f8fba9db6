"""Registers the models of `timm_rla` as soon as timm has loaded its own, without an import by the user.

PyTorch calls `install` at the end of `import torch`, by the entry point in its group `torch.backends`. That only leaves
a finder in `sys.meta_path`, which waits for `timm.models`. This module therefore needs the standard library alone, and
nothing in it may ever raise: an exception would end the user's `import torch`. TIMM_RLA_AUTOLOAD=0 switches it off.
"""
import importlib
import logging
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

TARGET = 'timm.models'
_logger = logging.getLogger('timm_rla')


def _register() -> None:
    try:
        importlib.import_module('timm_rla')
    except Exception as e:  # whatever is broken, timm goes on without these models
        _logger.warning(f'models of timm_rla are not registered: {type(e).__name__}: {e}')


class _Finder(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and has it followed by this package when it is executed."""

    def find_spec(self, fullname, path, target=None):
        if fullname != TARGET:
            return None
        try:
            sys.meta_path.remove(self)  # the others find it, and once is enough
            spec = find_spec(fullname)
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module):
                del loader.exec_module  # the instance's own, this function
                execute(module)
                _register()

            loader.exec_module = exec_module
            return spec
        except Exception:
            return None


def install() -> None:
    """Entry point. Does nothing if it has been called before."""
    try:
        if os.environ.get('TIMM_RLA_AUTOLOAD') == '0' or any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        if TARGET in sys.modules:
            _register()
        else:
            sys.meta_path.insert(0, _Finder())
    except Exception:
        pass
