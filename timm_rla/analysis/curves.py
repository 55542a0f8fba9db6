"""Loss and error of training runs over their epochs (the paper's Figure 3)."""
from pathlib import Path
from typing import Dict, List, Sequence

from ..common.errors import UserError
from ..common.extras import import_pyplot
from ..common.plotting import COLORS, check_picture, save_picture, tidy_axes
from ..common.summary import SUMMARY, read_summary

__all__ = ['plot_curves']


def _label(run: Path) -> str:
    return (run.parent if run.name == SUMMARY else run).resolve().name


def _column(rows: Sequence[Dict[str, float]], key: str) -> List[float]:
    return [row.get(key, float('nan')) for row in rows]


def plot_curves(runs: Sequence[Path], output: Path) -> Path:
    """Write the picture: loss on the left, top-1 error on the right; training dashed, validation solid.

    Args:
        runs: Folders of runs, or their summary.csv files.
        output: File to write.

    Returns:
        `output`.

    Raises:
        UserError: A run has no summary.csv with at least one epoch, or the format of `output` is not known.
    """
    tables = {}
    for run in runs:
        folder = run.parent if run.name == SUMMARY else run
        rows = read_summary(folder)
        if not rows:
            raise UserError(f'{run}: no {SUMMARY} with at least one epoch')
        tables[run] = rows
    check_picture(output)

    figure, (loss, error) = import_pyplot().subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    for index, (run, rows) in enumerate(tables.items()):
        style = dict(color=COLORS[index % len(COLORS)], marker='o' if len(rows) == 1 else None)
        label = _label(run)
        epochs = [row['epoch'] + 1 for row in rows]
        loss.plot(epochs, _column(rows, 'train_loss'), '--', label=f'{label}, training', **style)
        if 'eval_loss' in rows[0]:
            loss.plot(epochs, _column(rows, 'eval_loss'), label=f'{label}, validation', **style)
            error.plot(epochs, [100 - top1 for top1 in _column(rows, 'eval_top1')], **style)
    loss.set(xlabel='Epoch', ylabel='Loss')
    error.set(xlabel='Epoch', ylabel='Top-1 error, validation (%)')
    for axes in (loss, error):
        tidy_axes(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc='outside lower center', ncols=2, frameon=False)
    return save_picture(figure, output)
