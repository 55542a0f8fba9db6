"""Runs timm's own tests/test_models.py, unmodified, on the models of this package.

    python tests/run_timm_suite.py                         # all models, an hour or so on two cores
    python tests/run_timm_suite.py -k 'rla_resnet18'       # some, by a pytest expression
    python tests/run_timm_suite.py --sample                # one of each family, what CI runs
    python tests/run_timm_suite.py --hub                   # also the tests that download weights from the Hub

The tests come with the source distribution of the installed timm, which is fetched from the package index.
"""
import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import List

ALL = 'rla or _cifar'
SAMPLE = ' or '.join([
    'rla_resnet18', 'rla_seresnet18', 'rla_vector_resnet18', 'rla_resnet50d', 'rla_resnext50_32x4d', 'resnet20_cifar',
])


def fetch_tests(folder: Path) -> Path:
    """Folder of the unpacked source distribution of the installed timm."""
    source = folder / f'timm-{version("timm")}'
    if not source.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
             '--no-binary', 'timm', '--dest', folder, f'timm=={version("timm")}'],
            check=True,
        )
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # moved when it is whole
            with tarfile.open(folder / f'{source.name}.tar.gz') as archive:
                if hasattr(tarfile, 'data_filter'):  # not in Python 3.11.3 and older
                    archive.extraction_filter = tarfile.data_filter
                archive.extractall(temporary)
            Path(temporary, source.name).rename(source)
    return source


def main(options: List[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-k', default=ALL, metavar='EXPRESSION', help='models and tests to run')
    parser.add_argument('--sample', action='store_true', help='one model of each family')
    parser.add_argument('--hub', action='store_true', help="also tests that download; timm's own CI leaves them out")
    parser.add_argument('--folder', type=Path, default=Path(sys.prefix) / 'timm-tests', help='where the tests are kept')
    args, pytest_options = parser.parse_known_args(options)
    expression = f'({SAMPLE if args.sample else args.k})' + ('' if args.hub else ' and not pretrained')
    return subprocess.run(
        [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-k', expression, *pytest_options],
        cwd=fetch_tests(args.folder),
        env=dict(os.environ, TORCH_BACKEND='timm_rla'),  # the suite imports the module that this names
    ).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
