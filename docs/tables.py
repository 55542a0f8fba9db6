"""Writes the tables of README.md and docs/: counts from the models themselves, measurements from results/.

    python docs/tables.py           # rewrite them
    python docs/tables.py --check   # fail if they are not up to date
"""
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

from sections import evidence, models, speed, tried

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'results'
CIFAR, DETECTORS = RESULTS / 'cifar10-depth20', RESULTS / 'bccd-depth18'
AGAIN = RESULTS / 'cifar10-depth20-again'


class Section(NamedTuple):
    """What stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    page: str  # file, from the root of the repository
    lines: Callable[[], List[str]]


SECTIONS: Dict[str, Section] = {
    'quickstart': Section('README.md', lambda: tried.quickstart(RESULTS)),
    'accuracy': Section('README.md', lambda: evidence.accuracy(CIFAR)),
    'detector accuracy': Section('README.md', lambda: evidence.detector_accuracy(DETECTORS)),
    'models': Section('README.md', models.models),
    'cifar models': Section('README.md', models.cifar_models),
    'benchmark': Section('README.md', lambda: speed.benchmark(RESULTS)),
    'scaling': Section('README.md', lambda: speed.scaling(RESULTS)),
    'libraries': Section('README.md', lambda: tried.libraries(RESULTS, ROOT / 'setup.cfg')),
    'forms': Section('docs/design.md', lambda: speed.forms(RESULTS)),
    'answer': Section('docs/evidence.md', lambda: evidence.answer(CIFAR)),
    'report': Section('docs/evidence.md', lambda: evidence.report(CIFAR)),
    'again': Section('docs/evidence.md', lambda: evidence.report(AGAIN)),
    'smaller questions': Section('docs/evidence.md', lambda: evidence.smaller_questions(RESULTS)),
    'loading': Section('docs/evidence.md', lambda: speed.loading(RESULTS)),
    'detector answer': Section('docs/detection.md', lambda: evidence.detector_answer(DETECTORS)),
    'detector report': Section('docs/detection.md', lambda: evidence.report(DETECTORS)),
    'detectors': Section('docs/detection.md', lambda: speed.detectors(RESULTS)),
    'torture': Section('docs/reliability.md', lambda: tried.torture(RESULTS)),
    'matrix': Section('docs/reliability.md', lambda: tried.matrix(RESULTS)),
}


def render(page: str, text: str, sections: Dict[str, Section]) -> str:
    """Text of a page with its sections written anew.

    Raises:
        ValueError: A section's marks are not there, once each and in this order.
    """
    for name, section in sections.items():
        if section.page == page:
            begin, end = f'<!-- begin {name} -->\n', f'<!-- end {name} -->'
            if text.count(begin) != 1 or text.split(begin)[1].count(end) != 1:
                raise ValueError(f'{page}: {begin.strip()} and {end} must be there, once each')
            head, rest = text.split(begin)
            text = head + begin + '\n'.join([*section.lines(), end]) + rest.split(end)[1]
    return text


def main(check: bool) -> int:
    """Write the pages, or with `check` only compare them; returns the exit code."""
    differ = []
    for page in dict.fromkeys(section.page for section in SECTIONS.values()):
        text = (ROOT / page).read_text()
        new = render(page, text, SECTIONS)
        if new != text:
            differ.append(page)
            if not check:
                (ROOT / page).write_text(new)
    if differ and check:
        print(f'not up to date: {", ".join(differ)}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main('--check' in sys.argv))
