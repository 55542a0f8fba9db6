"""What all pictures of this package share: figures, colours, formats, names in them, and how a file is written."""
import textwrap
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from .errors import UserError, blame
from .extras import import_extra
from .files import check_writable, replacing

__all__ = [
    'COLORS', 'HIGHLIGHT', 'LARGEST', 'check_picture', 'line_style', 'new_figure', 'plain_label', 'save_picture',
    'set_title', 'subplots', 'tidy_axes', 'whole_steps',
]

# Okabe and Ito's, safe for the colour-blind
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
HIGHLIGHT = '#D55E00'  # their red
STYLES = ('-', '-.', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)))  # for more lines than there are colours
LARGEST = 1e30  # value that an axis can be drawn for
FORMATS = ('.png', '.svg', '.pdf')


def check_picture(output: Path, option: str = '--output') -> None:
    """Complain of a picture that cannot be written before the work for it is done.

    Raises:
        UserError: The format of `output` is not known, it cannot be written, or matplotlib is not installed.
    """
    import_extra('matplotlib', 'analysis')
    if output.suffix not in FORMATS:
        raise UserError(f'{option} {output}: the ending must be {", ".join(FORMATS[:-1])} or {FORMATS[-1]}')
    check_writable(output, option)


def new_figure(**kwargs: Any) -> Any:
    """A figure of matplotlib, apart from pyplot: what a notebook has set up there stays as it is."""
    return import_extra('matplotlib.figure', 'analysis').Figure(**kwargs)


def subplots(rows: int = 1, columns: int = 1, *, figsize: Tuple[float, float], **kwargs: Any) -> Tuple[Any, Any]:
    """A figure and its axes, as `pyplot.subplots`."""
    figure = new_figure(figsize=figsize, layout='constrained')
    return figure, figure.subplots(rows, columns, **kwargs)


def plain_label(text: str, length: int = 40) -> str:
    """A name of a file, class or run for a picture, shortened in the middle to so many characters.

    No sign in it is lost: matplotlib would leave out of legends what begins with an underscore.
    """
    text = ''.join(sign if sign.isprintable() else '?' for sign in text)
    if len(text) > length:
        text = f'{text[:(length - 1) // 2]}…{text[-(length // 2):]}'
    return f' {text}' if text.startswith('_') else text


def set_title(figure: Any, title: str) -> None:
    """A title above all axes, in as many lines as it needs. matplotlib would read formulas in it to break it."""
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, int(13 * figure.get_figwidth()))]
    figure.suptitle('\n'.join(lines), fontsize='medium')


def line_style(index: int) -> Dict[str, Any]:
    """Colour and line style of one line of many."""
    return dict(color=COLORS[index % len(COLORS)], linestyle=STYLES[index // len(COLORS) % len(STYLES)])


def whole_steps(axes: Any) -> None:
    """Ticks of a horizontal axis at whole numbers only, such as epochs."""
    steps = {step for line in axes.get_lines() for step in line.get_xdata()}
    if len(steps) == 1:  # matplotlib would zoom in on it
        axes.set_xticks(list(steps), [f'{step:g}' for step in steps])
    else:
        axes.xaxis.set_major_locator(import_extra('matplotlib.ticker', 'analysis').MaxNLocator('auto', integer=True))


def tidy_axes(axes: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def save_picture(figure: Any, output: Path, dpi: int = 150, source: Optional[str] = None) -> Path:
    """Write a figure in the format of the file's ending; returns `output`.

    Args:
        figure: Of matplotlib.
        output: File to write.
        dpi: Dots per inch of PNG.
        source: What it shows, as a note in a PNG.
    """
    matplotlib = import_extra('matplotlib', 'analysis')
    for text in figure.findobj(import_extra('matplotlib.text', 'analysis').Text):
        text.set_parse_math(False)  # a dollar in a name begins no formula
    settings: Dict[str, Any] = {'pdf.fonttype': 42}  # TrueType: many publishers refuse matplotlib's default
    with blame(f'--output {output}', OSError, ValueError):  # ValueError: too many pixels
        output.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(settings), replacing(output) as temporary, warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph .* missing')  # it draws a box
            note = dict(metadata={'Source': source}) if source and output.suffix == '.png' else {}
            figure.savefig(temporary, format=output.suffix[1:], dpi=dpi, **note)
    return output
