"""The picture of Figure 6: what each block of one or two networks looks at, above the layer attention of the image."""
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..common.extras import import_extra
from ..common.plotting import COLORS, HIGHLIGHT, new_figure, plain_label, save_picture, tidy_axes
from .attention_plot import label_blocks

__all__ = ['Explanation', 'NetworkMaps', 'overlay', 'plot_gradcam']

COLORMAP = 'viridis'  # perceptually uniform, safe for the colour-blind
MAX_COLUMNS = 12
# in inches
CELL, GAP, LABEL = 0.9, 0.06, 0.31
LINE = LABEL + CELL + GAP
MARGIN, TITLE, NETWORK, CURVE, LEGEND = 0.15, 0.3, 0.2, 1.1, 0.85
MIN_WIDTH = 7.5  # for the title


class NetworkMaps(NamedTuple):
    """Class activation maps and layer attention of one network for an image."""
    name: str  # written above its maps
    image: torch.Tensor  # input before normalisation, [3, H, W] or [1, H, W] in [0, 1]
    maps: Dict[str, torch.Tensor]  # class activation map [h, w] of each layer
    attention: Optional[Dict[str, float]] = None  # normalised layer attention of each block, of an RLA network


class Explanation(NamedTuple):
    """Class activation maps and layer attention of one or two networks for an image."""
    title: str
    networks: List[NetworkMaps]  # from top to bottom


def overlay(image: torch.Tensor, activation: torch.Tensor, size: int = 128) -> np.ndarray:
    """A class activation map, scaled by its maximum, over the image in grey; where it is the same everywhere, at zero.

    Args:
        image: [in_chans, H, W] in [0, 1].
        activation: [h, w]; negative values are nothing.
        size: Smallest height and width of the result.

    Returns:
        RGB picture [H', W', 3] in [0, 1].
    """
    scale = math.ceil(size / min(image.shape[1:]))
    grey = F.interpolate(image.mean(0)[None, None], scale_factor=scale)  # pixels stay pixels
    activation = activation.float().clamp(min=0)
    activation = torch.zeros_like(activation) if _is_flat(activation) else activation / activation.max()
    activation = F.interpolate(activation[None, None], grey.shape[2:], mode='bilinear', align_corners=False)[0, 0]
    heat = import_extra('matplotlib', 'analysis').colormaps[COLORMAP](activation.numpy())[..., :3]
    return 0.4 * grey[0, 0, :, :, None].numpy() + 0.6 * heat


def _is_flat(activation: torch.Tensor) -> bool:
    """True if a map tells no place from another, but for rounding."""
    return bool(activation.max() - activation.min() <= 1e-5 * activation.max())


def _map_label(layer: str, activation: torch.Tensor) -> str:
    """Name of the module and the maximum that its map is scaled by."""
    positive = activation.float().clamp(min=0)
    return f'{plain_label(layer, 14)}\n{"flat, " if _is_flat(positive) else "max "}{positive.max():.2g}'


def _highest(attention: Optional[Dict[str, float]]) -> Optional[str]:
    """Block with the highest layer attention; None if all are the same."""
    if not attention or min(attention.values()) == max(attention.values()):
        return None
    return max(attention, key=attention.__getitem__)


class _Page:
    """An explanation on a figure: positions are in inches from the top left corner."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation
        most = max(len(network.maps) for network in explanation.networks)
        self.columns = math.ceil(most / math.ceil(most / MAX_COLUMNS))
        self.has_curve = any(network.attention for network in explanation.networks)
        self.width = max(MIN_WIDTH, 2 * MARGIN + (self.columns + 1) * (CELL + GAP) + LEGEND)
        self.height = MARGIN + TITLE + sum(self._network_height(network) for network in explanation.networks)
        if self.has_curve:
            self.height += CURVE + LEGEND

    def _lines(self, network: NetworkMaps) -> int:
        return math.ceil(len(network.maps) / self.columns)

    def _network_height(self, network: NetworkMaps) -> float:
        return NETWORK + self._lines(network) * LINE + GAP

    def draw(self, figure: Any, left: float, top: float, legend: bool) -> None:
        """Draw onto a figure, from its upper left corner on.

        Args:
            figure: The figure.
            left: Position of the corner.
            top: Position of the corner.
            legend: Draw the scale of the maps, and say what the mark on the curve is.
        """
        self.figure = figure
        self.left = left
        y = top + MARGIN
        self._text(self.left + MARGIN, y, plain_label(self.explanation.title, 90), fontsize='medium', fontweight='bold')
        y += TITLE
        for network in self.explanation.networks:
            self._draw_network(network, y)
            y += self._network_height(network)
        if legend:
            self._draw_scale(top + MARGIN + TITLE + NETWORK + LABEL)
        for network in self.explanation.networks:
            if network.attention:
                self._draw_curve(network.attention, y + 0.15, legend)

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        w, h = self.figure.get_size_inches()
        return self.figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))

    def _text(self, x: float, y: float, text: str, **kwargs: Any) -> None:
        w, h = self.figure.get_size_inches()
        self.figure.text(x / w, 1 - y / h, text, verticalalignment='top', **kwargs)

    def _column(self, index: int) -> float:
        return self.left + MARGIN + index * (CELL + GAP)

    def _draw_image(self, x: float, y: float, picture: np.ndarray, label: str, framed: bool = False) -> None:
        axes = self._axes(x, y + LABEL, CELL, CELL)
        axes.imshow(picture, cmap='gray', vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(label, fontsize=6.5, pad=4, color=HIGHLIGHT if framed else 'black')
        for spine in axes.spines.values():
            spine.set(visible=framed, color=HIGHLIGHT, linewidth=2.5)

    def _draw_network(self, network: NetworkMaps, y: float) -> None:
        self._text(self.left + MARGIN, y, plain_label(network.name, 110), fontsize='small')
        y += NETWORK
        image = network.image if len(network.image) in (1, 3, 4) else network.image.mean(0, keepdim=True)
        self._draw_image(self._column(0), y, image.permute(1, 2, 0).squeeze(2).numpy(), 'input')
        highest = _highest(network.attention)
        for index, (layer, activation) in enumerate(network.maps.items()):
            line, column = divmod(index, self.columns)
            self._draw_image(
                self._column(column + 1),
                y + line * LINE,
                overlay(network.image, activation),
                _map_label(layer, activation),
                framed=highest is not None and layer.startswith(f'{highest}.'),
            )

    def _draw_scale(self, y: float) -> None:
        axes = self._axes(self._column(self.columns + 1) + GAP, y, 0.1, CELL)
        axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=COLORMAP, aspect='auto', extent=(0, 1, 0, 1))
        axes.set(xticks=[])
        axes.set_yticks([0, 1], ['0', 'max'], fontsize=7)
        axes.yaxis.tick_right()

    def _draw_curve(self, attention: Dict[str, float], y: float, legend: bool) -> None:
        left = self._column(1)
        axes = self._axes(left, y, self.columns * (CELL + GAP) - GAP, CURVE)
        values = list(attention.values())
        tidy_axes(axes)
        axes.margins(y=0.15)
        axes.plot(values, '-o', color=COLORS[0], markersize=4, linewidth=1)
        highest = _highest(attention)
        if highest is not None:
            index = list(attention).index(highest)
            axes.plot([index], [values[index]], 's', color=HIGHLIGHT, markersize=6, label='highest')
            if legend:
                axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False, fontsize=7, borderaxespad=0)
        label_blocks(axes, list(attention))
        axes.tick_params(labelsize=7)
        axes.set_ylabel('Layer attention,\nnormalised', fontsize=8)
        edge = 0.5 * CELL / (CELL + GAP)  # each block's value lies under its map
        axes.set_xlim(-edge, len(values) - 1 + edge)


def plot_gradcam(explanations: Sequence[Explanation], output: Path) -> Path:
    """One picture with all explanations, in a grid about as high as wide, whose legend stands once.

    Args:
        explanations: At least one.
        output: File to write; PNG, SVG or PDF by its ending.

    Returns:
        `output`.
    """
    pages = [_Page(explanation) for explanation in explanations]
    width, height = max(page.width for page in pages), max(page.height for page in pages)
    columns = min(len(pages), max(1, round(math.sqrt(len(pages) * height / width))))
    rows = math.ceil(len(pages) / columns)
    figure = new_figure(figsize=(columns * width, rows * height))
    for index, page in enumerate(pages):
        row, column = divmod(index, columns)
        page.draw(figure, column * width, row * height, legend=row == 0 and column == columns - 1)
    return save_picture(figure, output, dpi=120)  # a page of many images
