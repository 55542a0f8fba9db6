"""Pictures have room for all that is drawn, for networks of any depth."""
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from timm_rla.analysis import Moments, attention_plot, gradcam_plot

DEPTHS = {5: (2, 2, 1), 8: (2, 2, 2, 2), 16: (3, 4, 6, 3), 33: (3, 4, 23, 3), 54: (18, 18, 18)}


def block_names(layers):
    return [f'layer{stage + 1}.{block}' for stage, blocks in enumerate(layers) for block in range(blocks)]


def moments_of_classes(blocks, num_classes):
    values = torch.rand(2 * num_classes, len(blocks), generator=torch.Generator().manual_seed(0))
    return Moments.of(values, torch.arange(2 * num_classes) % num_classes, num_classes)


def assert_no_overlap(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legends = list(figure.legends) + [axes.legend_ for axes in figure.axes if axes.legend_]
    boxes = [legend.get_window_extent(renderer) for legend in legends] + [t.get_window_extent() for t in figure.texts]
    for axes in figure.axes:
        ticks = [tick for tick in axes.get_xticklabels() if tick.get_text() and tick.get_visible()]
        labels = [*ticks, axes.title, axes.xaxis.label, axes.yaxis.label]
        boxes += [axes.get_window_extent(renderer)]
        boxes += [label.get_window_extent(renderer) for label in labels if label.get_text()]
    boxes = [box.padded(-1) for box in boxes]
    for i, box in enumerate(boxes):
        assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1)
        assert figure.bbox.padded(1).containsy(box.y0) and figure.bbox.padded(1).containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[i + 1:])


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are when they would be written."""
    drawn = []
    for module in (attention_plot, gradcam_plot):
        monkeypatch.setattr(module, 'save_picture', lambda figure, output, **kwargs: drawn.append(figure))
    return drawn


@pytest.mark.parametrize('depth', DEPTHS)
def test_curves_have_room(depth, figures):
    blocks = block_names(DEPTHS[depth])
    moments = moments_of_classes(blocks, 20)
    names = [f'a rather long name of class {k}' for k in range(20)]
    attention_plot.plot_attention(moments, blocks, Path('a.png'), title='rla_vector_resnet101, 50,000 images')
    attention_plot.plot_classes(moments, blocks, names, Path('c.png'), title='rla_vector_resnet101, 50,000 images')
    for figure in figures:
        assert_no_overlap(figure)
    curve, _ = figures
    marked = curve.axes[0].get_legend_handles_labels()[0][0].get_xdata()
    assert [blocks[i].split('.')[1] for i in marked] == ['0'] * len(DEPTHS[depth])


def framed(figure):
    pictures = [axes for axes in figure.axes if axes.images and axes.get_title()]
    return [axes.get_title() for axes in pictures if axes.spines['top'].get_visible()]


@pytest.mark.parametrize('depth, networks', [(5, 1), (5, 2), (8, 2), (16, 1), (33, 2)])
def test_maps_have_room(depth, networks, figures):
    blocks = block_names(DEPTHS[depth])
    maps = {f'{block}.bn2': torch.rand(4, 4) for block in blocks}
    picture = gradcam_plot.NetworkMaps('resnet', torch.rand(3, 16, 16), maps)
    attention = {block: float(index % 7 == 3) + index / 99 for index, block in enumerate(blocks)}
    recurrent = picture._replace(name='rla_resnet', attention=attention)
    title = 'n02105412_10026.JPEG: killer whale, 93.2% (predicted)'
    page = gradcam_plot.Explanation(title, [picture, recurrent][-networks:])
    gradcam_plot.plot_gradcam([page] * (2 if depth < 16 else 1), Path('g.png'))
    assert_no_overlap(figures[0])
    highest = max(recurrent.attention, key=recurrent.attention.get)
    assert {title.split('\n')[0] for title in framed(figures[0])} == {f'{highest}.bn2'}


def test_no_block_is_framed_where_all_are_alike(figures):
    maps = {f'layer1.{i}.bn2': torch.zeros(4, 4) for i in range(3)}  # no evidence anywhere
    attention = {f'layer1.{i}': 0. for i in range(3)}
    gradcam_plot.plot_gradcam([gradcam_plot.Explanation(
        'x', [gradcam_plot.NetworkMaps('rla', torch.rand(1, 8, 8), maps, attention)])], Path('g.png'))
    assert not framed(figures[0])
