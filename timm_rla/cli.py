"""The command line, `timm-rla COMMAND`: each command is a module of `commands`, imported when it is called."""
import importlib
import os
import sys
from typing import List, Optional

__all__ = ['COMMANDS', 'main']

COMMANDS = {  # name, also of the module, and what --help says
    'train': "train a model, with the options of timm's train.py",
    'validate': "evaluate a model, with the options of timm's validate.py",
    'attention': 'plot the layer attention over a validation set',
    'gradcam': 'plot what each block of a network looks at in images',
    'curves': 'plot loss and error of runs',
    'freeze': "make timm's plain network of one that was trained with attention",
    'reproduce': 'train what a table of the paper needs, and report it',
    'benchmark': 'measure speed and memory of models beside each other',
    'export': 'write a checkpoint as a folder that timm and transformers load',
    'push': 'publish a checkpoint on the Hugging Face Hub',
    'quickstart': 'train a small network on handwritten digits',
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
    return '\n'.join(['usage: timm-rla COMMAND [OPTION ...]', '', 'Recurrent Layer Attention networks for timm.', '',
                      'commands:', *lines, '', 'timm-rla COMMAND --help tells its options'])


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command.

    Returns:
        The exit code: 2 for bad input, which is said in one line. TIMM_RLA_TRACEBACK=1 shows where it was found.
    """
    from .common.errors import UserError

    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        print(_usage())
        return 0
    if name == '--version':
        from .version import __version__
        print(__version__)
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f'{name}: no such command; there are {", ".join(COMMANDS)}')
        importlib.import_module(f'.commands.{name}', __package__).main(rest)
    except UserError as e:
        if os.environ.get('TIMM_RLA_TRACEBACK') == '1':
            raise
        if os.environ.get('RANK', '0') == '0':
            print(f'timm-rla {name}: error: {e}' if name in COMMANDS else f'timm-rla: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'timm-rla {name}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0
