"""Options of a run's command, from its table, its recipe and the user."""
from typing import Any, Dict, List, Optional, Sequence

from ..common.errors import UserError
from ..common.options import parse
from ..common.recipes import recipes
from .content import GIVEN
from .plan import Run
from .tasks import DATASETS, Task

__all__ = ['recipe_length', 'run_options']


def _recipe(dataset: str) -> List[str]:
    return ['--config', str(recipes()[DATASETS[dataset].recipe])]


def recipe_length(task: Task, dataset: str) -> int:
    """Length of the recipe of a data set, in epochs or iterations."""
    return getattr(parse(task.parser(), _recipe(dataset)), f'{task.unit}s')


def run_options(task: Task, run: Run, length: Optional[int], options: Sequence[str]) -> List[str]:
    """Options of a run's command, but for its folder.

    Args:
        task: What the table's runs are.
        run: The run.
        length: Its epochs or iterations, those of the recipe if None.
        options: Further options, above those of the recipe; '{seed}', '{cell}' and '{depth}' in them stand for the
            run's seed, the key of its network, such as 'plain', and its depth.

    Raises:
        UserError: Options that the command does not have, or that say otherwise than the table.
    """
    recipe = _recipe(run.cell.dataset)
    args = parse(task.parser(), recipe)
    options = [_filled(option, run) for option in options]
    given = [*recipe]
    kwargs = {**getattr(args, f'{task.network}_kwargs'), **_further_kwargs(task, run, options),
              **run.cell.model_kwargs}
    if length is not None:
        given += [f'--{task.unit}s', str(length)]
        for name, value in task.scaled_schedule(args, length).items():
            given += [f'--{name.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    # An option with one value ends those of the schedule: the user's options may begin with a folder
    given += [f'--{task.network}', run.cell.model, '--seed', str(run.seed), *options, *_words(task, run)]
    if kwargs:  # behind the options, whose own would take the place of the others
        given += [f'--{task.network}-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    return given


def _filled(text: str, run: Run) -> str:
    for field, value in (('{seed}', run.seed), ('{cell}', run.cell.key), ('{depth}', run.cell.depth)):
        text = text.replace(field, str(value))
    return text


def _words(task: Task, run: Run) -> List[str]:
    """Options of a cell, by names as in recipes, as they are written on a command line."""
    words: List[str] = []
    for name, value in run.cell.options.items():
        option = f'--{name.replace("_", "-")}'
        if value is True:
            words += [option]
        elif isinstance(value, (dict, list)):
            entries = [f'{key}={entry}' for key, entry in value.items()] if isinstance(value, dict) else value
            words += [option, *(_filled(str(entry), run) for entry in entries)]
        else:  # which may begin with a minus
            words += [f'{option}={_filled(str(value), run)}']
    return words


def _further_kwargs(task: Task, run: Run, options: Sequence[str]) -> Dict[str, Any]:
    """Arguments of the network among further options, none of which may say otherwise than the table."""
    parser = task.parser()
    reasons = {task.network: 'the table says which networks there are; --only and --depth choose among them', **GIVEN,
               **{name: f'the table says what it is for {run.cell.name}' for name in run.cell.options}}
    parser.set_defaults(**dict.fromkeys(reasons))
    found = parser.parse_args(options)
    for name, reason in reasons.items():
        value = getattr(found, name)
        if value is not None:
            raise UserError(f'--{name.replace("_", "-")} {value}: cannot be given: {reason}')
    kwargs = getattr(found, f'{task.network}_kwargs')
    for key in kwargs.keys() & run.cell.model_kwargs.keys():
        if kwargs[key] != run.cell.model_kwargs[key]:
            raise UserError(f'--{task.network}-kwargs {key}={kwargs[key]}: {run.cell.name} of this table has '
                            f'{key}={run.cell.model_kwargs[key]}')
    return kwargs
