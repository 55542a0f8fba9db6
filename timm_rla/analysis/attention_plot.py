"""Pictures of layer attention over the blocks (Figure 5): its mean over many images, and the mean of each class."""
from pathlib import Path
from typing import Any, List, Optional, Sequence

import torch

from ..common.plotting import COLORS, HIGHLIGHT, plain_label, save_picture, subplots, tidy_axes
from .classes import short_name
from .moments import Moments

__all__ = ['distinct_classes', 'first_blocks', 'label_blocks', 'plot_attention', 'plot_classes']

CLASS_COLORS = COLORS[:-1]  # black is for all images
MARKERS = 'osD^vP*X<>'
SHOWN_CLASSES = 10  # more curves in one picture cannot be told apart


def first_blocks(blocks: Sequence[str]) -> List[int]:
    """Indices of the first block of each stage."""
    return [index for index, block in enumerate(blocks) if block.endswith('.0')]


def label_blocks(axes: Any, blocks: Sequence[str]) -> None:
    """Write the names of the blocks under an axis, sideways."""
    axes.set_xticks(range(len(blocks)), [plain_label(block) for block in blocks])
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.tick_params(axis='x', labelrotation=90, labelsize='small')


def _new_figure(blocks: Sequence[str], panels: int = 1, legend: float = 0.) -> Any:
    """A figure and its axes, one above the other, with a place for each block; `legend` is its width on the right."""
    width = min(max(5.5, 1.5 + 0.25 * len(blocks)), 11.0) + legend
    figure, axes = subplots(panels, sharex=True, squeeze=False, figsize=(width, 1.5 + 2.6 * panels))
    for panel in axes[:, 0]:
        tidy_axes(panel)
    label_blocks(axes[-1, 0], blocks)
    return figure, axes[:, 0]


def plot_attention(
        moments: Moments,
        blocks: Sequence[str],
        output: Path,
        title: Optional[str] = None,
        source: Optional[str] = None,
) -> Path:
    """Mean layer attention with one standard deviation over the images; the first block of each stage is marked.

    Args:
        moments: Statistics over L blocks; their groups are put together.
        blocks: Names of the blocks [L].
        output: File to write; PNG, SVG or PDF by its ending.
        title: Title of the picture.
        source: Note in a PNG of the weights that it shows, as from `weights_id`.

    Returns:
        `output`.
    """
    moments = moments.over_groups()
    mean, std = moments.mean[0].numpy(), moments.std[0].numpy()
    figure, (axes,) = _new_figure(blocks)
    axes.plot(mean, color=COLORS[0], linewidth=0.8, alpha=0.6)
    axes.errorbar(
        range(len(blocks)), mean, std, fmt='o', color=COLORS[0], markersize=4, capsize=3,
        label='mean ± 1 standard deviation')
    first = first_blocks(blocks)
    axes.plot(first, mean[first], 's', color=HIGHLIGHT, markersize=5, label='first block of a stage', zorder=3)
    axes.set_ylabel('Layer attention')
    axes.set_title(title and plain_label(title, 80), fontsize='medium')
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc='outside lower center', ncols=2, frameon=False)
    return save_picture(figure, output, source=source)


def distinct_classes(moments: Moments, count: int = SHOWN_CLASSES) -> List[int]:
    """The classes whose mean curves lie farthest from the mean curve of all, in the order of their indices."""
    distance = (moments.mean - moments.over_groups().mean).square().mean(1)  # [K]
    distance[moments.count == 0] = -1
    found = distance.topk(min(count, int((moments.count > 0).sum()))).indices
    return sorted(found.tolist())


def plot_classes(
        moments: Moments,
        blocks: Sequence[str],
        names: Sequence[str],
        output: Path,
        classes: Optional[Sequence[int]] = None,
        title: Optional[str] = None,
) -> Path:
    """Mean layer attention of classes, and below its difference from that of all images, with the standard error of
    the class's mean; other classes in grey.

    Args:
        moments: Statistics of K classes over L blocks.
        blocks: Names of the blocks [L].
        names: Names of the classes [K].
        output: File to write; PNG, SVG or PDF by its ending.
        classes: Classes to show; the ten that differ most from the mean if None.
        title: Title of the picture.

    Returns:
        `output`.
    """
    classes = distinct_classes(moments) if classes is None else classes
    mean = moments.over_groups().mean  # [1, L]
    figure, (above, below) = _new_figure(blocks, panels=2, legend=1.5)
    others = [k for k in range(len(names)) if moments.count[k] > 0 and k not in classes]
    for axes, reference in ((above, 0.), (below, mean)):
        curves = (moments.mean - reference).where(moments.count[:, None] > 0, torch.nan)  # [K, L]
        for k in others:
            axes.plot(
                curves[k], color='0.8', linewidth=0.5, zorder=1, rasterized=True,  # a thousand lines in an SVG
                label='other classes' if k == others[0] else None)
        errors = (moments.std / moments.count.clamp(min=1)[:, None].sqrt()) if axes is below else None
        for index, k in enumerate(classes):
            axes.errorbar(
                range(len(blocks)),
                curves[k],
                None if errors is None else errors[k],
                color=CLASS_COLORS[index % len(CLASS_COLORS)],
                linestyle=('-', ':')[index // len(CLASS_COLORS) % 2],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1,
                elinewidth=0.8,
                label=plain_label(f'{short_name(names[k])}, n = {int(moments.count[k]):,}'),
            )
        axes.plot((mean - reference)[0], '--', color='black', linewidth=1, label='all images', zorder=4)
    above.set_ylabel('Layer attention')
    below.set_ylabel('Difference from all images,\n± standard error')
    above.set_title(title and plain_label(title, 80), fontsize='medium')
    figure.legend(*above.get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize='small')
    return save_picture(figure, output)
