"""Which classes a network gets right, and for which others it takes the rest."""
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, List, Sequence

import numpy as np
import torch

from ..common.files import write_csv
from ..common.plotting import plain_label, save_picture, set_title, subplots
from ..common.table import format_columns
from .classes import short_name

__all__ = ['Confusion', 'format_classes', 'most_confused', 'plot_confusion', 'write_classes', 'write_matrix']

SHOWN = 20  # rows of the printed table
DRAWN = 30  # classes in the picture, which names them and shows counts


@dataclass(frozen=True)
class Confusion:
    """Counts of images [K, K] by label (row) and prediction (column)."""
    counts: torch.Tensor

    @classmethod
    def of(cls, targets: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> 'Confusion':
        """Count them; both [n] in [0, num_classes)."""
        pairs = targets * num_classes + predicted
        return cls(torch.bincount(pairs, minlength=num_classes ** 2).view(num_classes, num_classes))

    @cached_property
    def images(self) -> torch.Tensor:
        """Images of each class [K]."""
        return self.counts.sum(1)

    @cached_property
    def accuracy(self) -> torch.Tensor:
        """Of each class in percent [K]; nan where there are no images."""
        return 100 * self.counts.diagonal() / self.images

    def mistaken_for(self, index: int) -> int:
        """The class that images of a class are most often taken for, other than itself; -1 if there is none."""
        row = self.counts[index].clone()
        row[index] = 0
        return int(row.argmax()) if row.max() > 0 else -1


def format_classes(confusion: Confusion, names: Sequence[str]) -> str:
    """Lines of text: images and accuracy of each class, of many those with the lowest accuracy."""
    accuracy = confusion.accuracy.tolist()
    present = confusion.images.nonzero().flatten().tolist()
    shown = sorted(present, key=accuracy.__getitem__)[:SHOWN]
    shown = sorted(shown) if len(present) <= SHOWN else shown
    rows = [('class', 'images', 'accuracy %', 'most often taken for')]
    for index in shown:
        other = confusion.mistaken_for(index)
        text = f'{short_name(names[other])} ({int(confusion.counts[index, other])})' if other >= 0 else ''
        rows.append((short_name(names[index]), f'{int(confusion.images[index]):,}',
                     f'{accuracy[index]:.2f}', text))
    widths = [max(len(row[column]) for row in rows) for column in (1, 2)]
    rows = [(name, *(cell.rjust(width) for cell, width in zip(cells, widths)), text) for name, *cells, text in rows]
    more = '' if len(present) <= SHOWN else f'\nthe {SHOWN} classes with the lowest accuracy, of {len(present)}'
    return format_columns(rows, left=4) + more


def write_classes(confusion: Confusion, names: Sequence[str], path: Path) -> Path:
    """Write a row for each class as CSV; returns `path`."""
    rows = []
    for index, name in enumerate(names):
        images = int(confusion.images[index])
        top1 = round(confusion.accuracy[index].item(), 4) if images else None
        rows.append([index, name, images, int(confusion.counts[index, index]), top1])
    return write_csv(path, ['index', 'name', 'images', 'correct', 'top1'], rows, '--confusion')


def write_matrix(confusion: Confusion, names: Sequence[str], path: Path) -> Path:
    """Write the counts as CSV, a row for each label and a column for each prediction; returns `path`."""
    rows = [[name, *row] for name, row in zip(names, confusion.counts.tolist())]
    return write_csv(path, ['label', *names], rows, '--confusion')


def plot_confusion(confusion: Confusion, names: Sequence[str], output: Path, title: str = '') -> Path:
    """Share of each class's images (row) that are taken for each class (column).

    Of many classes, those that are most often taken for each other, and a last column for all others.

    Args:
        confusion: Of K classes.
        names: Names of the classes [K].
        output: File to write; PNG, SVG or PDF by its ending.
        title: Title of the picture.
    """
    chosen = range(len(names)) if len(names) <= DRAWN else most_confused(confusion, DRAWN)
    counts = confusion.counts[list(chosen)][:, list(chosen)]
    columns = [plain_label(names[index], 16) for index in chosen]
    rows = list(columns)
    images = confusion.images[list(chosen)]
    if len(names) > DRAWN:
        counts = torch.cat([counts, (images - counts.sum(1))[:, None]], 1)
        columns.append('all others')
        title = f'{title}\nthe {DRAWN} classes of {len(names):,} that are most often taken for each other'
    shares = (counts / images.clamp(min=1)[:, None]).numpy()

    size = 2.5 + 0.36 * len(rows)
    figure, axes = subplots(figsize=(size + 0.8, size))
    # the square root brings out the rare confusions, which are what one looks for
    image = axes.imshow(np.sqrt(shares), cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel='Prediction', ylabel='Label')
    set_title(figure, title)
    _write_counts(axes, counts.tolist(), shares)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(['0', '1 %', '5 %', '10 %', '25 %', '50 %', '100 %'])
    bar.set_label('Share of the images with this label')
    return save_picture(figure, output)


def most_confused(confusion: Confusion, count: int) -> List[int]:
    """Indices of `count` classes, in order: those of the pairs with the most confusions in either direction."""
    wrong = confusion.counts.clone()
    wrong.fill_diagonal_(0)
    pairs = torch.triu(wrong + wrong.T).flatten()
    # 2 * count pairs would do, were there no two alike: of these, those of the first classes
    least = pairs.topk(min(len(pairs), count ** 2)).values[-1]
    chosen: List[int] = []
    candidates = (pairs >= least).nonzero().flatten()
    for pair in candidates[pairs[candidates].argsort(descending=True, stable=True)].tolist():
        for index in divmod(pair, len(wrong)):
            if index not in chosen and len(chosen) < count:
                chosen.append(index)
        if len(chosen) == count:
            break
    return sorted(chosen)


def _write_counts(axes: Any, counts: Sequence[Sequence[int]], shares: np.ndarray) -> None:
    for row, line in enumerate(counts):
        for column, value in enumerate(line):
            if value:
                axes.text(column, row, str(value), ha='center', va='center', fontsize=6,
                          color='white' if shares[row, column] > 0.35 else 'black')
