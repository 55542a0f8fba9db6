"""README.md says what the files under results/ and the models themselves say."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_up_to_date():
    check = subprocess.run([sys.executable, ROOT / 'docs' / 'tables.py', '--check'])
    assert check.returncode == 0, 'run python docs/tables.py'
