"""What the attentions of a table's runs do, and the accuracy without them (`timm-rla freeze --study`)."""
import json
import logging
import reprlib
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ..common.errors import UserError, blame
from ..common.summary import read_summary
from ..common.trained import is_number
from .plan import Cell, Run
from .report import Row, format_interval, paired_interval
from .results import Results

__all__ = ['Studied', 'markdown_lines', 'read_studies']

STUDY = 'frozen.json'  # of a run, as `timm-rla freeze RUN/last.pth.tar --study` writes it
SPREADS = ('mean', 'std', 'class_std')  # of a block's attention
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Studied:
    """A cell whose runs have been studied. All lists are by seed; what is 0 has no sign."""
    cell: Cell
    seeds: List[int]
    studies: List[Dict[str, Any]]

    def gains(self, kind: str) -> List[float]:
        """Percentage points of top-1 error that go with attention held; `kind` is 'means' or 'class_means'."""
        return [0. - study[kind]['difference'] for study in self.studies]

    def intervals(self, kind: str) -> List[Tuple[float, float]]:
        """Of the same, over the images of validation."""
        return [(0. - upper, 0. - lower) for lower, upper in (study[kind]['interval'] for study in self.studies)]

    def blocks(self) -> List[str]:
        return list(self.studies[0]['blocks'])

    def spread(self, block: str, column: str) -> List[float]:
        """'mean', 'std' or 'class_std' of a block's attention."""
        return [study['blocks'][block][column] for study in self.studies]

    def held(self, block: str) -> List[float]:
        """Percentage points of top-1 error that come with one block's attention held at its mean."""
        return [0. - study['held'][block]['difference'] for study in self.studies]


def read_studies(results: Results, rows: Sequence[Row]) -> List[Studied]:
    """Studies of finished runs, for each row that has one. One of other weights than the last is left out, and said.

    Raises:
        UserError: A file that is damaged, or whose blocks are others than those of the first seed.
    """
    studied = []
    for row in rows:
        studies: Dict[int, Dict[str, Any]] = {}
        for seed in row.values:
            folder = results.path / Run(row.cell, seed).name
            if not (folder / STUDY).is_file():
                continue
            study, last = _read_study(folder / STUDY), int(read_summary(folder)[-1]['epoch'])
            of_run = dict(model=row.cell.model, epoch=last, use_ema=False)
            differ = [f'{key} {study[key]}, not {value}' for key, value in of_run.items()
                      if study.get(key, value) != value]
            if differ:
                _logger.warning(f'{folder / STUDY}: of {"; ".join(differ)} as the run has ended; left out')
                continue
            first = next(iter(studies.values()), study)
            if list(study['blocks']) != list(first['blocks']):
                raise UserError(f'{folder / STUDY}: its blocks are {", ".join(study["blocks"])}, those of other seeds '
                                f'{", ".join(first["blocks"])}')
            studies[seed] = study
        if studies:
            studied.append(Studied(row.cell, list(studies), list(studies.values())))
    return studied


def _read_study(path: Path) -> Dict[str, Any]:
    """A study with all that the report takes from it.

    Raises:
        UserError: It is damaged.
    """
    with blame(f'{path}: not as timm-rla freeze --study writes it', ArithmeticError, AttributeError,
               LookupError, OSError, RecursionError, TypeError, ValueError):
        study = json.loads(path.read_text(encoding='utf-8'))
        blocks = study['blocks']
        numbers = {}
        for kind in ('means', 'class_means'):
            lower, upper = study[kind]['interval']
            numbers.update({f'difference of {kind}': study[kind]['difference'],
                            f'lower end of {kind}': lower, f'upper end of {kind}': upper})
        for block, spreads in blocks.items():
            numbers.update({f'{column} of {block}': spreads[column] for column in SPREADS})
            numbers[f'difference of {block}'] = study['held'][block]['difference']
        for name, value in [*numbers.items(), ('epoch', study.get('epoch', 0))]:
            if not is_number(value):
                raise ValueError(f'{name} is {reprlib.repr(value)}')
        if not blocks:
            raise ValueError('no blocks')
        return study


def _change(values: Sequence[float]) -> Tuple[str, str]:
    return f'{statistics.mean(values):+.2f}', format_interval(paired_interval(values))


def _over_seeds(values: Sequence[float], form: str) -> str:
    """Mean, and what it hides: the lowest and the highest."""
    text = format(statistics.mean(values), form)
    return f'{text} ({min(values):{form}} to {max(values):{form}})' if len(values) > 1 else text


def markdown_lines(studied: Sequence[Studied]) -> List[str]:
    """Two tables: error with held attentions, and each block's attention."""
    if not studied:
        return []
    splits, val_splits = (
        ' and '.join(sorted({str(study.get(key, default)) for entry in studied for study in entry.studies}))
        for key, default in (('split', 'train'), ('val_split', 'validation')))
    lines = [
        '',
        '## With attention, and with its means',
        '',
        'Change of the top-1 error, in percentage points, when every attention is held at its mean over the images of '
        f'the split {splits}, or over those of the image\'s class, which reads the label; above 0 the attention of the '
        f'single image was worth something. Of a seed with the 95 % interval over the images of {val_splits}, which '
        'are the same for all seeds; of the mean over seeds with its 95 % t-interval.',
        '',
        '| network | seed | means | interval | means of classes | interval |',
        '|---|---|---|---|---|---|',
    ]
    for entry in studied:
        kinds = ('means', 'class_means')
        for index, seed in enumerate(entry.seeds):
            cells = [entry.cell.name, str(seed)]
            for kind in kinds:
                cells += [f'{entry.gains(kind)[index]:+.2f}', format_interval(entry.intervals(kind)[index])]
            lines.append(f'| {" | ".join(cells)} |')
        if len(entry.seeds) > 1:
            cells = [entry.cell.name, 'mean', *(text for kind in kinds for text in _change(entry.gains(kind)))]
            lines.append(f'| {" | ".join(cells)} |')
    lines += [
        '',
        'Attention of each block: mean, standard deviation over images, standard deviation of the means of classes '
        '(of RLA-vector means over channels), and the change of the top-1 error when this block alone is held at its '
        'mean. Means over seeds, with the lowest and the highest seed.',
        '',
        '| network | block | mean | std | std of classes | held alone |',
        '|---|---|---|---|---|---|',
    ]
    for entry in studied:
        for block in entry.blocks():
            cells = [entry.cell.name, f'`{block}`',
                     *(_over_seeds(entry.spread(block, column), '.4f') for column in SPREADS),
                     _over_seeds(entry.held(block), '+.2f')]
            lines.append(f'| {" | ".join(cells)} |')
    return lines
