"""Loss and error of training runs over their epochs (the paper's Figure 3)."""
import math
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from ..common.errors import UserError
from ..common.plotting import (
    LARGEST,
    check_picture,
    line_style,
    plain_label,
    save_picture,
    subplots,
    tidy_axes,
    whole_steps,
)
from ..common.summary import SUMMARY, read_summary

__all__ = ['plot_curves']


COLUMNS = ('train_loss', 'eval_loss', 'eval_top1')
OF_DETECTORS = 'eval_map'
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


def _curve(rows: Sequence[Dict[str, float]], key: str) -> Tuple[List[float], List[float]]:
    """Epochs that have a value, from 1 on, and the values; nan, a gap, for those that no axis could be drawn for."""
    found = [(row['epoch'] + 1, row[key]) for row in rows if key in row]  # not in all if it validates at intervals
    return [epoch for epoch, _ in found], [value if abs(value) < LARGEST else math.nan for _, value in found]


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
        if OF_DETECTORS in rows[-1]:
            raise UserError(f'{run}: a run of a detector, which has no {COLUMNS[-1]}; timm-rla reproduce draws its '
                            'curves, and --log-tensorboard does')
        if all(math.isnan(value) for key in COLUMNS for value in _curve(rows, key)[1]):
            raise UserError(f'{run}: no number to draw in the columns {", ".join(COLUMNS)} of its {SUMMARY}')
        tables[run] = rows
    check_picture(output)

    legend_rows = math.ceil(len(tables) / 2)
    figure, (loss, error) = subplots(1, 2, figsize=(9, 3.6 + 0.24 * legend_rows))
    for index, (label, rows) in enumerate(zip(_labels(list(tables)), tables.values())):
        style = line_style(index)
        loss.plot(*_curve(rows, 'train_loss'), label=label, **{**style, **TRAINING})
        loss.plot(*_curve(rows, 'eval_loss'), **style)
        epochs, top1 = _curve(rows, 'eval_top1')
        error.plot(epochs, [100 - value for value in top1], **style)
    loss.set(xlabel='Epoch', ylabel='Loss, thin: of training')
    error.set(xlabel='Epoch', ylabel='Top-1 error, validation (%)')
    for axes in (loss, error):
        for line in axes.get_lines():
            if len(line.get_xdata()) == 1:  # a single epoch has no line
                line.set_marker('o')
        tidy_axes(axes)
        whole_steps(axes)
    legend = figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize='small')
    for line in legend.get_lines():
        line.set(linewidth=1.5, alpha=1)
    return save_picture(figure, output)
