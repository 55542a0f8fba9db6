"""Measured accuracy, from the folders that `timm-rla reproduce --report` writes."""
from pathlib import Path
from typing import Dict, List

from .markdown import NOT_MEASURED, read_rows, table

QUESTIONS = {'rla': 'RLA-20', 'se': 'SE-20', 'rla_vector': 'RLA-vector-20', 'ia_rla': 'IA+RLA-20'}
DETECTORS = {'rla': 'RLA-18', 'se': 'SE-18'}
SMALLER = {  # folders of the smaller questions
    'cifar10-warm-start': 'warm start, 10 epochs',
    'cifar10-after-freeze': 'one epoch after the freeze',
    'cifar10-one-change': 'one change at a time, 10 epochs',
    'cifar10-warm-start-new-classifier': 'warm start with a new classifier, 10 epochs',
}
APART = {'cifar10-warm-start-first': 'warm start, older options, 10 epochs'}  # folders without a report


def accuracy(folder: Path) -> List[str]:
    """Errors of the networks that have runs, beside the paper's, and differences from the plain one."""
    return table(['network', 'top-1 error, %', 'seeds', 'minus plain, paired by seed', 'paper'], (
        [f'`{row["model"]}`', *_figures(row), row['paper'] or '-']
        for row in _cells(folder, 'error').values() if row['mean']))


def smaller_questions(results: Path) -> List[str]:
    """The same of the runs that smaller questions have, by the keys of their cells."""
    rows = []
    for name, question in SMALLER.items():
        cells = _cells(results / name, 'error') if (results / name / 'report.csv').is_file() else {}
        measured = [[question, f'`{key}`', *_figures(row)] for key, row in cells.items() if row['mean']]
        rows += measured or [[question, '', NOT_MEASURED, '', '']]
    for name, question in APART.items():
        for run in sorted((results / name).glob('*-seed*')):
            *_, network, seed = run.name.replace('-seed', '-').split('-')
            error = 100 - float(read_rows(run / 'summary.csv')[-1]['eval_top1'])
            rows.append([question, f'`{network}`, seed {seed}', f'{error:.2f}', '1', '-'])
    return table(['question', 'network', 'top-1 error, %', 'seeds', 'minus plain, paired by seed'], rows)


def detector_accuracy(folder: Path) -> List[str]:
    """The same of detectors, in both metrics."""
    large = _cells(folder, 'map_50')
    return table(
        ['backbone', 'mAP@[.5,.95], %', 'seeds', 'minus plain, paired by seed', 'mAP@.5, %', 'seeds', 'minus plain'],
        ([f'`{row["model"]}`', *_figures(row), *_figures(large[key])] for key, row in _cells(folder, 'map').items()))


def answer(folder: Path) -> List[str]:
    """For each network of Table 1 that the plan asks about."""
    cells = _cells(folder, 'error')
    return [_verdict(name, 'ResNet-20', cells.get(key, {}), cells['plain'], -1) for key, name in QUESTIONS.items()]


def detector_answer(folder: Path) -> List[str]:
    """For each backbone, in both metrics."""
    lines = []
    for metric, text in (('map', 'mAP@[.5,.95]'), ('map_50', 'mAP@.5')):
        cells = _cells(folder, metric)
        lines += [_verdict(f'{name}, {text},', 'ResNet-18', cells[key], cells['plain'], 1)
                  for key, name in DETECTORS.items()]
    return lines


def report(folder: Path) -> List[str]:
    """The report of a table, as `timm-rla reproduce` writes it, below a heading of the page."""
    title, *lines = (folder / 'report.md').read_text().splitlines()
    return [f'*{title.removeprefix("# ")}*', *(f'#{line}' if line.startswith('##') else line for line in lines)]


def _cells(folder: Path, metric: str) -> Dict[str, Dict[str, str]]:
    """A row of a report for each network that has one, by its key."""
    return {row['cell']: row for row in read_rows(folder / 'report.csv') if row['metric'] == metric}


def _figures(row: Dict[str, str]) -> List[str]:
    """Mean and standard deviation, seeds, difference and interval."""
    mean, difference = NOT_MEASURED, '-'
    if row['mean']:
        mean = f'{float(row["mean"]):.2f}' + (f' ± {float(row["std"]):.2f}' if row['std'] else '')
    if row['lower']:
        difference = '{:+.2f} ({:+.2f} to {:+.2f})'.format(
            *(float(row[key]) for key in ('difference', 'lower', 'upper')))
    return [mean, row['n'], difference]


def _verdict(name: str, plain_name: str, row: Dict[str, str], plain: Dict[str, str], sign: int) -> str:
    """The rule of docs/evidence.md and docs/detection.md, applied to a network; `sign` is -1 if lower is better."""
    if not row.get('lower'):
        return f'- **{name} against {plain_name}:** {NOT_MEASURED}.'
    difference, lower, upper = (float(row[column]) for column in ('difference', 'lower', 'upper'))
    worst, best = sorted((sign * lower, sign * upper))
    verdict = 'it helps' if worst > 0 else 'it hurts' if best < 0 else 'these runs cannot tell'
    text = f'- **{name} against {plain_name}: {verdict}.** {difference:+.2f} points, {lower:+.2f} to {upper:+.2f}, ' \
           f'n = {row["pairs"]}.'
    if row['paper']:
        text += f' The paper has {float(row["paper"]) - float(plain["paper"]):+.2f}.'
    return text
