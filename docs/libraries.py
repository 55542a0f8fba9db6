"""Writes results/libraries.csv: the versions of other libraries with which their tests have passed, here and now.

    python docs/libraries.py
"""
import csv
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {  # distribution: its name in the tests
    'timm': None,  # by all tests
    'transformers': 'transformers',
    'segmentation-models-pytorch': 'segmentation_models_pytorch',
    'fastai': 'fastai',
    'torchvision': 'torchvision',
}


def main() -> int:
    """Run the tests, write the table if all have passed; returns the exit code."""
    tests = [ROOT / 'tests' / 'models' / 'test_libraries.py', '-q', '--strict-markers']
    passed = subprocess.run([sys.executable, '-m', 'pytest', *tests], cwd=ROOT, capture_output=True, text=True)
    if passed.returncode or 'skipped' in passed.stdout.lower():
        print(passed.stdout, file=sys.stderr)
        return 1
    with open(ROOT / 'results' / 'libraries.csv', 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['library', 'version', 'date'])
        writer.writerows([name, version(name), date.today().isoformat()] for name in LIBRARIES)
    return 0


if __name__ == '__main__':
    sys.exit(main())
