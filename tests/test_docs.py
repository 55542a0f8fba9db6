"""What README.md and docs/ say is what the files under results/, the models and the commands say."""
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from packaging.version import Version

from timm_rla.common.options import parse
from timm_rla.detection.options import train_parser as detect_train_parser
from timm_rla.reproduce.plan import load_table
from timm_rla.reproduce.results import Results
from timm_rla.train.options import train_parser

ROOT = Path(__file__).parents[1]
PAGES = ['README.md', *(f'docs/{path.name}' for path in sorted((ROOT / 'docs').glob('*.md')))]


def blocks(page, language):
    """Blocks of code of a page, in a language."""
    fences = re.findall(r'^```(\w*)\n(.*?)^```$', (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands():
    """Each timm-rla command in a block of a page, a line that is continued being one."""
    found = []
    for page in PAGES:
        for block in blocks(page, ''):
            for line in block.replace('\\\n', ' ').splitlines():
                match = re.match(r'(?:\$ )?(?:timm-rla|torchrun .* timm-rla) (\w+)( .*)?$', line.strip())
                if match:
                    arguments = re.split(r'\s#|\s\|\s', match[2] or '')[0]
                    found.append((match[1], shlex.split(arguments)))
    return found


@pytest.mark.parametrize('snippet', blocks('README.md', 'python'), ids=lambda text: text.splitlines()[0])
def test_python_snippets_run(snippet):
    """Each by itself, as it stands, but for what needs weights from the Hub."""
    lines = [line for line in snippet.splitlines() if 'pretrained=True' not in line]
    exec('import timm\n' + '\n'.join(lines), {})


@pytest.mark.long
def test_site(tmp_path):
    """Every page is built, and every link to another page is one."""
    sphinx = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', ROOT / 'docs', tmp_path]
    built = subprocess.run(sphinx, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in ('index', 'evidence', 'api/networks', 'api/weights'):
        assert (tmp_path / f'{page}.html').is_file()
    assert 'freeze_attention' in (tmp_path / 'api' / 'weights.html').read_text()


def test_there_are_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize('name, arguments', commands(), ids=lambda part: part if isinstance(part, str) else '')
def test_options_of_commands_exist(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f'timm_rla.commands.{name}')
    if name == 'train':
        parse(train_parser(), arguments)
    elif name == 'quickstart':  # options of train follow their own
        parse(train_parser(), module.quickstart_parser().parse_known_args(arguments)[1])
    elif name == 'reproduce':
        args, options = module.reproduce_parser().parse_known_args(arguments)
        if args.table.startswith('examples/') and Version(timm.__version__) < Version('1.0.27'):
            pytest.skip('the example needs timm 1.0.27')
        table = load_table(args.table, args.depth, args.datasets, args.only)
        length = getattr(args, f'{table.task.unit}s')
        Results(tmp_path, table, length, options)  # complains of what the runs would
    elif name == 'detect':
        action, *options = arguments
        if action == 'train':
            parse(detect_train_parser(), options)
        else:
            commands = importlib.import_module(f'timm_rla.detection.commands.{action}')
            getattr(commands, f'{action}_parser')().parse_args(options)
    else:
        getattr(module, f'{name}_parser')().parse_args(arguments)
