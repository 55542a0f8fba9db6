"""Loss and error of training runs over their epochs (the paper's Figure 3)."""
import math
from pathlib import Path
from typing import Dict, List, Sequence

from ..common.errors import UserError
from ..common.plotting import COLORS, check_picture, plain_label, save_picture, subplots, tidy_axes
from ..common.summary import SUMMARY, read_summary

__all__ = ['plot_curves']


STYLES = ('-', '-.', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))  # of validation, for more runs than there are colours
TRAINING = dict(linewidth=0.8, alpha=0.6)


def _labels(runs: Sequence[Path]) -> List[str]:
    """Names of the runs' folders, with as many folders above as it takes to tell them apart."""
    parts = [(run.parent if run.name == SUMMARY else run).resolve().parts for run in runs]
    depths = [1] * len(runs)
    while True:
        labels = ['/'.join(part[-depth:]) for part, depth in zip(parts, depths)]
        longer = [
            depth + (labels.count(label) > 1 and depth < len(part))
            for label, depth, part in zip(labels, depths, parts)
        ]
        if longer == depths:
            return [plain_label(label, 50) for label in labels]
        depths = longer


def _column(rows: Sequence[Dict[str, float]], key: str) -> List[float]:
    return [row.get(key, float('nan')) for row in rows]


def plot_curves(runs: Sequence[Path], output: Path) -> Path:
    """Write the picture: loss on the left, thin in training, and top-1 error on the right.

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

    legend_rows = math.ceil(len(tables) / 2)
    figure, (loss, error) = subplots(1, 2, figsize=(9, 3.6 + 0.24 * legend_rows))
    for index, (label, rows) in enumerate(zip(_labels(list(tables)), tables.values())):
        style = dict(
            color=COLORS[index % len(COLORS)],
            linestyle=STYLES[index // len(COLORS) % len(STYLES)],
            marker='o' if len(rows) == 1 else None,  # a single epoch has no line
        )
        epochs = [row['epoch'] + 1 for row in rows]
        loss.plot(epochs, _column(rows, 'train_loss'), label=label, **{**style, **TRAINING})
        if 'eval_loss' in rows[0]:
            loss.plot(epochs, _column(rows, 'eval_loss'), **style)
            error.plot(epochs, [100 - top1 for top1 in _column(rows, 'eval_top1')], **style)
    loss.set(xlabel='Epoch', ylabel='Loss, thin: of training')
    error.set(xlabel='Epoch', ylabel='Top-1 error, validation (%)')
    for axes in (loss, error):
        tidy_axes(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize='small')
    for line in legend.get_lines():
        line.set(linewidth=1.5, alpha=1)
    return save_picture(figure, output)
