"""examples/own_photos.ipynb from top to bottom, without its installation."""
import os
import sys
from pathlib import Path

import nbformat
import pytest
import timm
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / 'examples' / 'own_photos.ipynb'


@pytest.mark.long
@pytest.mark.skipif(timm.__version__ == '1.0.21', reason='timm 1.0.21 reads every file of local-dir: as a pickle')
def test_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells)  # committed without
    notebook.cells = [cell for cell in notebook.cells if 'install' not in cell.metadata.get('tags', [])]
    for cell in notebook.cells:
        cell.source = cell.source.replace('EPOCHS = 3', 'EPOCHS = 1')
    NotebookClient(notebook, timeout=240, kernel_name='python3', resources=dict(metadata=dict(path=tmp_path))).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    text = ''.join(output.get('text', '') for output in outputs)
    assert 'error:' not in text and 'Traceback' not in text, text
    assert '360 validation images' in text and 'Nothing was sent to ORG/NAME' in text and "['0', '1'," in text
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3
