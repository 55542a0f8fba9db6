"""What all pictures of this package share: colours, formats, and how a file is written."""
from pathlib import Path
from typing import Any

from .errors import UserError, blame
from .extras import import_pyplot

__all__ = ['COLORS', 'HIGHLIGHT', 'check_picture', 'save_picture', 'tidy_axes']

# Okabe and Ito's, safe for the colour-blind
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
HIGHLIGHT = '#D55E00'  # their red
FORMATS = ('.png', '.svg', '.pdf')


def check_picture(output: Path) -> None:
    """Complain of a picture that cannot be written before the work for it is done.

    Raises:
        UserError: The format of `output` is not known, or matplotlib is not installed.
    """
    import_pyplot()
    if output.suffix not in FORMATS:
        raise UserError(f'--output {output}: the ending must be {", ".join(FORMATS[:-1])} or {FORMATS[-1]}')


def tidy_axes(axes: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def save_picture(figure: Any, output: Path, dpi: int = 150) -> Path:
    """Write a figure in the format of the file's ending, PNG with so many dots per inch; close it, return `output`."""
    pyplot = import_pyplot()
    with blame(f'--output {output}', OSError, ValueError):  # ValueError: too many pixels
        output.parent.mkdir(parents=True, exist_ok=True)
        with pyplot.rc_context({'pdf.fonttype': 42}):  # TrueType: many publishers refuse matplotlib's default
            figure.savefig(output, dpi=dpi)
    pyplot.close(figure)
    return output
