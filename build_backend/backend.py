"""setuptools, with one change: an editable installation copies `timm_rla_autoload` instead of pointing into the clone.

PyTorch imports that module at every `import torch`. Without the copy, `import torch` would fail as soon as the clone is
moved or deleted.
"""
import base64
import hashlib
import os
import zipfile

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403, the other hooks of a build backend

MODULE = 'timm_rla_autoload.py'


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build hook of PEP 660."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    path = os.path.join(wheel_directory, name)
    with open(MODULE, 'rb') as f:
        source = f.read()
    digest = base64.urlsafe_b64encode(hashlib.sha256(source).digest()).rstrip(b'=').decode()
    with zipfile.ZipFile(path) as wheel, zipfile.ZipFile(f'{path}.tmp', 'w', zipfile.ZIP_DEFLATED) as new:
        for item in wheel.infolist():
            content = wheel.read(item)
            if item.filename.endswith('.dist-info/RECORD'):
                content = content.rstrip() + f'\n{MODULE},sha256={digest},{len(source)}\n'.encode()
            new.writestr(item, content)
        new.writestr(MODULE, source)
    os.replace(f'{path}.tmp', path)
    return name
