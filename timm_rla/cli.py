"""The command line, `timm-rla COMMAND`: each command is a module with a `main(argv)`, imported when it is called."""
import importlib
import os
import sys
from typing import List, NamedTuple, Optional

__all__ = ['main']


class Command(NamedTuple):
    module: str
    help: str


COMMANDS = {
    'train': Command('timm_rla.train.run', "train a model, with the options of timm's train.py"),
    'validate': Command('timm_rla.train.validate', "evaluate a model, with the options of timm's validate.py"),
    'attention': Command('timm_rla.analysis.attention_cli', 'plot the layer attention over a validation set'),
    'gradcam': Command('timm_rla.analysis.gradcam_cli', 'plot what each block of a network looks at in images'),
    'curves': Command('timm_rla.curves', 'plot loss and error of runs'),
    'benchmark': Command('timm_rla.benchmark.command', 'measure speed and memory of models beside each other'),
    'export': Command('timm_rla.hub.export', 'write a checkpoint as a folder that timm and transformers load'),
    'push': Command('timm_rla.hub.push', 'publish a checkpoint on the Hugging Face Hub'),
    'quickstart': Command('timm_rla.quickstart', 'train a small network on handwritten digits'),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {command.help}' for name, command in COMMANDS.items()]
    return '\n'.join(['usage: timm-rla COMMAND [OPTION ...]', '', 'Recurrent Layer Attention networks for timm.', '',
                      'commands:', *lines, '', 'timm-rla COMMAND --help tells its options'])


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code, 2 for bad input, which is said in one line."""
    from .errors import UserError

    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        print(_usage())
        return 0
    if name == '--version':
        from .version import __version__
        print(__version__)
        return 0
    primary = os.environ.get('RANK', '0') == '0'
    try:
        if name not in COMMANDS:
            raise UserError(f'{name}: no such command; there are {", ".join(COMMANDS)}')
        importlib.import_module(COMMANDS[name].module).main(rest)
    except UserError as e:
        if primary:
            print(f'timm-rla {name}: error: {e}' if name in COMMANDS else f'timm-rla: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'timm-rla {name}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0
