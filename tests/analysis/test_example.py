"""examples/what_it_learned.py from top to bottom."""
import runpy
from pathlib import Path

import pytest

from timm_rla.commands.quickstart import write_digits

EXAMPLE = Path(__file__).parents[2] / 'examples' / 'what_it_learned.py'


@pytest.mark.long
def test_example(tmp_path, monkeypatch, digits, capsys):
    """The script with cells, from top to bottom, on the digits that are written already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'output' / 'what_it_learned').mkdir(parents=True)
    (tmp_path / 'output' / 'what_it_learned' / 'digits').symlink_to(write_digits(digits))
    found = runpy.run_path(str(EXAMPLE))
    assert EXAMPLE.read_text().count('# %%') >= 5
    assert int(found['moments'].count.sum()) == 360
    written = [path for path in capsys.readouterr().out.splitlines() if path.endswith('.png')]
    assert [Path(path).name for path in written] == \
        ['curves.png', 'attention.png', 'attention-classes.png', 'gradcam.png']
    assert all(Path(path).stat().st_size > 5000 for path in written)
