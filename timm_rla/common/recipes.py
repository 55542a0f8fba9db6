"""Recipes: the YAML files of train_configs/, found by name from any folder."""
from importlib import resources
from pathlib import Path
from typing import Dict, Optional

from .errors import UserError

__all__ = ['describe_recipe', 'find_recipe', 'recipes']


def recipes(command: Optional[str] = None) -> Dict[str, Path]:
    """The recipes of this package by name.

    Args:
        command: Those of 'train' or of 'detect train' only.
    """
    checkout = Path(__file__).parents[2] / 'train_configs'  # in a clone; a wheel has them inside the package
    folder = checkout if checkout.is_dir() else Path(str(resources.files('timm_rla').joinpath('recipes')))
    return {path.stem: path for path in sorted(folder.glob('*.yaml')) if command in (None, _command(path))}


def _command(path: Path) -> str:
    """The command that a recipe is for, as its comment has it."""
    return 'detect train' if 'timm-rla detect train' in path.read_text() else 'train'


def find_recipe(name: str) -> Path:
    """File of a recipe.

    Args:
        name: Path of a YAML file, or name of one of this package's recipes. A file wins.

    Raises:
        UserError: Neither; lists the names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipes()
    if name not in known:
        raise UserError(f'--config {name}: neither a file nor a recipe; recipes are {", ".join(known)}')
    return known[name]


def describe_recipe(path: Path) -> str:
    """The first sentence of a recipe's comment."""
    first = path.read_text().splitlines()[0].removeprefix('# ')
    return first.split(': ')[0].split('. ')[0].rstrip(':.')
