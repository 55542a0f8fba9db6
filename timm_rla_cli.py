"""The command line, `timm-rla COMMAND`: each command is a module of `timm_rla.commands`, imported when it is called.

It stands outside the package, whose import takes PyTorch and timm along: --help, --version and a mistyped command
answer at once.
"""
import difflib
import importlib
import importlib.metadata
import os
import sys
import traceback
from typing import List, Optional

__all__ = ['COMMANDS', 'main']

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: another try is welcome
NO_READER = 141  # as of a program that the signal of a closed pipe has ended
COMMANDS = {  # name, also of the module, and what --help says
    'train': "train a model, with the options of timm's train.py",
    'validate': "evaluate a model, with the options of timm's validate.py",
    'predict': 'name the most probable classes of images',
    'attention': 'plot the layer attention over a validation set',
    'gradcam': 'plot what each block of a network looks at in images',
    'curves': 'plot loss and error of runs',
    'freeze': "make timm's plain network of one that was trained with attention",
    'detect': 'train, evaluate and use object detectors',
    'reproduce': 'train what a table of the paper needs, and report it',
    'benchmark': 'measure speed and memory of models beside each other',
    'export': 'write a checkpoint as a folder that timm and transformers load',
    'push': 'publish a checkpoint on the Hugging Face Hub',
    'list': 'show the models and recipes of this package',
    'quickstart': 'train a small network on handwritten digits',
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
    return '\n'.join(['usage: timm-rla COMMAND [OPTION ...]', '', 'Recurrent Layer Attention networks for timm.', '',
                      'commands:', *lines, '', 'timm-rla COMMAND --help tells its options'])


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f'did you mean {close[0]}?' if close else f'there are {", ".join(COMMANDS)}'


def _show_all_names() -> None:
    """Names of files may hold what the encoding of the terminal has no sign for: show it as escapes."""
    if hasattr(sys.stdout, 'reconfigure'):  # not where a caller has put something else in its place
        sys.stdout.reconfigure(errors='backslashreplace')


def _drop_output() -> bool:
    """True if what was printed cannot be written, as on a full disk. Nothing of it is left for the end of Python."""
    try:
        sys.stdout.write('\n')  # to try it
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _let_go(error: Optional[BaseException]) -> None:
    """Free what the frames of an error hold: a loader's workers then end here, not at some garbage collection."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command.

    Returns:
        The exit code: 2 for bad input, which is said in one line, 75 if the run was asked to stop and can go on, 141
        if nobody reads what is printed any more.
        TIMM_RLA_TRACEBACK=1 shows where bad input was found.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        print(_usage())
        return 0
    if name == '--version':
        print(importlib.metadata.version('timm_rla'))
        return 0
    if name not in COMMANDS:
        print(f'timm-rla: error: {name}: no such command; {_suggestion(name)}', file=sys.stderr)
        return 2
    try:
        from timm_rla.common.errors import UserError
    except ValueError as e:  # of an environment variable
        print(f'timm-rla: error: {e}', file=sys.stderr)
        return 2
    from timm_rla.common.log import setup_logging
    from timm_rla.common.ranks import failed_elsewhere, is_first_to_say, where
    from timm_rla.common.stopping import Stopped

    title = f'{name} {rest[0]}' if name == 'detect' and rest and rest[0].isalpha() else name

    def say(message: str) -> None:
        if is_first_to_say(message):
            print(f'timm-rla {title}: {message}', file=sys.stderr, flush=True)

    setup_logging()
    _show_all_names()
    try:
        importlib.import_module(f'timm_rla.commands.{name}').main(rest)
        sys.stdout.flush()
    except UserError as e:
        if os.environ.get('TIMM_RLA_TRACEBACK') == '1':
            raise
        say(f'error: {where()}{e}')
        _let_go(e)
        return 2
    except Stopped as e:
        say(str(e))
        _let_go(e)
        return STOPPED
    except KeyboardInterrupt:
        say('interrupted')
        return 130
    except BrokenPipeError:
        _drop_output()
        return NO_READER
    except OSError as e:
        if _drop_output():
            say(f'error: the output cannot be written: {e.strerror}')
        elif isinstance(e, PermissionError) and e.filename is not None and os.environ.get('TIMM_RLA_TRACEBACK') != '1':
            say(f'error: {where()}{os.fsdecode(e.filename)}: {e.strerror}')
        else:
            raise
        return 2
    except Exception:
        if failed_elsewhere():  # what breaks here is the connection to the process that has said why
            return 2
        raise
    return 0
