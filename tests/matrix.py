"""The last commit tested in an environment for each supported Python, and for the oldest supported libraries.

    make matrix
    make matrix MATRIX='--only oldest'

Writes results/matrix.csv, a row for each environment, empty for those that have not been run yet. A Python that this
machine does not have is said to be missing.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ('environment', 'python', 'torch', 'torchvision', 'timm', 'passed', 'failed', 'skipped', 'date')
# Libraries of the tests that go with every torch and timm; the tests of others are skipped where these are missing
TOOLS = ('build', 'captum', 'hypothesis', 'ipykernel', 'nbclient', 'pycocotools', 'pytest', 'pytest-timeout',
         'pytest-xdist', 'setuptools>=77')
EXTRAS = 'analysis,detection,docs,quickstart,tensorboard,wandb'


VERSIONS = """
import json, platform
from importlib.metadata import version
print(json.dumps(dict(python=platform.python_version(), **{n: version(n) for n in ('torch', 'torchvision', 'timm')})))
"""


class Environment(NamedTuple):
    """What is installed."""
    name: str
    python: str
    pinned: List[str]


OLDEST = ['timm==1.0.21', 'torch==2.5.1', 'torchvision==0.20.1', 'numpy<2.3']
ENVIRONMENTS = [
    Environment('oldest', 'python3.10', OLDEST),
    *(Environment(f'newest, Python 3.{minor}', f'python3.{minor}', []) for minor in (10, 11, 12, 13)),
]


def works(python: str) -> bool:
    """True if such a Python starts here."""
    return bool(shutil.which(python)) and not subprocess.run([python, '-c', ''], capture_output=True).returncode


def run(environment: Environment, folder: Path, arguments: List[str]) -> Dict[str, Any]:
    """Install and test; returns the row of the environment."""
    python, source = str(folder / 'bin' / 'python'), folder / 'source'
    subprocess.run([environment.python, '-m', 'venv', str(folder)], check=True)
    subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(source)], check=True)
    print(f'{environment.name}: installing', flush=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *environment.pinned,
                    *TOOLS, '-e', f'{source}[{EXTRAS}]'], check=True)
    report = folder / 'report.xml'
    print(f'{environment.name}: testing', flush=True)
    subprocess.run([python, '-m', 'pytest', '-q', '-n', '2', '--long', f'--junitxml={report}',
                    *(arguments or ['tests'])], cwd=source, env=dict(os.environ, PYTHONDONTWRITEBYTECODE='1'))
    counts = ET.parse(report).getroot().find('testsuite').attrib
    failed, skipped = int(counts['failures']) + int(counts['errors']), int(counts['skipped'])
    shown = subprocess.run([python, '-c', VERSIONS], capture_output=True, text=True, check=True).stdout
    versions = json.loads(shown)
    return dict(environment=environment.name, **versions, passed=int(counts['tests']) - failed - skipped,
                failed=failed, skipped=skipped, date=date.today().isoformat())


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', default=[], help='words in the names of environments')
    args, arguments = parser.parse_known_args()
    path = ROOT / 'results' / 'matrix.csv'
    rows: Dict[str, Dict[str, Any]] = {each.name: dict(environment=each.name) for each in ENVIRONMENTS}
    if path.is_file():
        with open(path, newline='') as f:
            rows.update((row['environment'], row) for row in csv.DictReader(f))
    failed = False
    for environment in ENVIRONMENTS:
        if args.only and not any(word in environment.name for word in args.only):
            continue
        if not works(environment.python):
            print(f'{environment.name}: {environment.python} is missing on this machine')
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = run(environment, Path(folder) / 'environment', arguments)
        print(row, flush=True)
        failed |= row['failed'] > 0
        if not arguments:  # a part of the tests is no result
            rows[environment.name] = row
            with open(path, 'w', newline='') as f:
                writer = csv.DictWriter(f, COLUMNS)
                writer.writeheader()
                writer.writerows(rows.values())
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
