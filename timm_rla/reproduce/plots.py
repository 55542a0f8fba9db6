"""Pictures of a table: training and validation curves (Figure 3), and all differences with their intervals."""
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from ..analysis.attention_plot import label_blocks
from ..common.plotting import (
    COLORS,
    LARGEST,
    line_style,
    plain_label,
    save_picture,
    set_title,
    subplots,
    tidy_axes,
    whole_steps,
)
from .plan import Run
from .report import Row
from .results import Results
from .studies import Studied

__all__ = ['plot_attentions', 'plot_curves', 'plot_differences']

NAME = 60  # characters of a network's name


def _panels(rows: Sequence[Row]) -> List[List[Row]]:
    """Rows by data set and depth."""
    panels: dict = {}
    for row in rows:
        panels.setdefault((row.cell.dataset, row.cell.depth), []).append(row)
    return list(panels.values())


def plot_curves(results: Results, rows: Sequence[Row], heading: str, output: Path) -> Path:
    """Training loss and figures of validation over the run, with a band from the lowest to the highest seed.

    Args:
        results: Folder of the runs.
        rows: Rows of the table; those without a finished run are left out.
        heading: Title of the picture.
        output: File to write; PNG, SVG or PDF by its ending.
    """
    task = results.table.task
    panels = _panels([row for row in rows if row.values])
    columns = 1 + len(task.metrics)
    figure, axes = subplots(max(1, len(panels)), columns, squeeze=False,
                            figsize=(4.5 * columns, 0.9 + 3.2 * max(1, len(panels))))
    for (left, *right), panel in zip(axes, panels):
        for metric, ax in zip(task.metrics, right):
            shown = [row for row in panel if row.metric == metric]
            for index, row in enumerate(shown):
                lines = [{task.done(line): line for line in results.rows(Run(row.cell, seed))} for seed in row.values]
                steps = sorted(set(lines[0]).intersection(*lines))  # a row may be damaged in one of the runs
                runs = [[run[step] for step in steps] for run in lines]
                style = dict(line_style(index), label=f'{plain_label(row.cell.name, NAME)}, n = {len(runs)}')
                _draw_band(ax, steps, [[metric.value(line) for line in run] for run in runs], style)
                if metric == task.metrics[0]:
                    _draw_band(left, steps, [[line['train_loss'] for line in run] for run in runs], style)
            ax.set(xlabel=task.unit.capitalize(), ylabel=f'{metric.name}, {panel[0].cell.dataset} (%)')
        left.set(xlabel=task.unit.capitalize(), ylabel='Training loss')
        for ax in (left, *right):
            tidy_axes(ax)
            whole_steps(ax)
        right[-1].legend(frameon=False, fontsize='small')
    set_title(figure, heading)
    return save_picture(figure, output)


def _draw_band(axes: Any, steps: Sequence[int], runs: Sequence[Sequence[float]], style: Dict[str, Any]) -> None:
    values = np.array(runs)  # [seeds, steps]
    values[abs(values) >= LARGEST] = np.nan  # no axis could be drawn for them
    marker = 'o' if len(steps) == 1 else None  # one step has no line
    axes.plot(steps, values.mean(0), marker=marker, linewidth=1.2, **style)
    axes.fill_between(steps, values.min(0), values.max(0), color=style['color'], alpha=0.2, linewidth=0)


def plot_differences(rows: Sequence[Row], measure: str, heading: str, output: Path) -> Path:
    """Difference from the plain network in each metric with its interval, and the paper's.

    Args:
        rows: Rows of the table.
        measure: What the metrics are.
        heading: Title of the picture.
        output: File to write; PNG, SVG or PDF by its ending.
    """
    shown = [row for row in rows if row.cell.key != 'plain' and row.difference is not None]
    plain = {(row.cell.dataset, row.cell.depth, row.metric): row.paper for row in rows if row.cell.key == 'plain'}
    references = [plain[row.cell.dataset, row.cell.depth, row.metric] for row in shown]
    several = len({row.metric for row in rows}) > 1
    figure, axes = subplots(figsize=(7.5, 1.6 + 0.32 * max(1, len(shown))))
    tidy_axes(axes)
    axes.axvline(0, color='black', linewidth=0.8)
    for y, row in enumerate(shown):
        if row.interval is not None:
            axes.plot(row.interval, (y, y), color=COLORS[0], linewidth=2, solid_capstyle='butt')
    here = [(row.difference, y) for y, row in enumerate(shown) if row.interval is not None]
    single = [(row.difference, y) for y, row in enumerate(shown) if row.interval is None]
    paper = [(row.paper - reference, y) for y, (row, reference) in enumerate(zip(shown, references))
             if row.paper is not None and reference is not None]
    if here:
        axes.plot(*zip(*here), 'o', color=COLORS[0], label='here, with 95 % interval')
    if single:
        axes.plot(*zip(*single), 'o', color=COLORS[0], fillstyle='none', label='here, one seed: no interval')
    if paper:
        axes.plot(*zip(*paper), 'D', color=COLORS[1], markersize=4, label='paper')
    axes.set_yticks(range(len(shown)), [
        f'{plain_label(row.cell.name, NAME)}, {row.cell.dataset}, {f"{row.metric.name}, " if several else ""}'
        f'n = {row.pairs}' for row in shown])
    axes.invert_yaxis()
    better = 'left' if rows[0].metric.lower_is_better else 'right'
    axes.set_xlabel(  # to the left it may run below the names
        f'Difference in {measure} from plain, percentage points ({better} is better)', loc='right')
    set_title(figure, heading)
    if shown:
        figure.legend(loc='outside lower center', ncols=3, frameon=False)
    return save_picture(figure, output)


def plot_attentions(studied: Sequence[Studied], heading: str, output: Path) -> Path:
    """Attention of each block with its standard deviation over images, and what is lost where it is held at its mean.

    Args:
        studied: Cells with their studies, one or more; those with the same blocks share a row of panels.
        heading: Title of the picture.
        output: File to write; PNG, SVG or PDF by its ending.
    """
    rows: Dict[Tuple[str, ...], List[Studied]] = {}
    for entry in studied:
        rows.setdefault(tuple(entry.blocks()), []).append(entry)
    figure, axes = subplots(len(rows), 2, squeeze=False, figsize=(9, 0.6 + 3.8 * len(rows)))
    for (left, right), (names, entries) in zip(axes, rows.items()):
        blocks = np.arange(len(names))
        for index, entry in enumerate(entries):
            mean, std = (np.array([entry.spread(name, column) for name in names]).mean(1)  # over seeds
                         for column in ('mean', 'std'))
            held = np.array([entry.held(name) for name in names])  # [L, seeds]
            style = dict(line_style(index), linewidth=1.2, marker='o', markersize=3)
            left.plot(blocks, mean, label=plain_label(entry.cell.name, NAME), **style)
            left.fill_between(blocks, mean - std, mean + std, color=style['color'], alpha=0.25, linewidth=0)
            right.plot(blocks, held.mean(1), **style)
            right.fill_between(blocks, held.min(1), held.max(1), color=style['color'], alpha=0.2, linewidth=0)
        left.set(ylabel='Attention, mean and std over images', ylim=(0, 1))
        right.set(ylabel='Error added, this block held at its mean (points)')
        right.axhline(0, color='black', linewidth=0.8)
        for ax in (left, right):
            tidy_axes(ax)
            label_blocks(ax, names)
        left.legend(frameon=False, fontsize='small')
    set_title(figure, heading)
    return save_picture(figure, output)
