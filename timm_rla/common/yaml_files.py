"""Reading YAML files of unknown origin: in bounded time and memory, whatever they hold."""
from pathlib import Path
from typing import Any, Dict, Optional

import yaml

from .errors import UserError, blame

__all__ = ['read_mapping']

BYTES = 1 << 20
VALUES = 10_000  # of a file, with each alias written out


def read_mapping(path: Path, source: str) -> Dict[str, Any]:
    """Content of a YAML file that holds a mapping of names to values; nothing if it is empty.

    Args:
        path: The file.
        source: Option and file, for messages.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    with blame(source, OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError):
        with open(path, encoding='utf-8') as f:
            text = f.read(BYTES + 1)
        if len(text) > BYTES:
            raise UserError(f'{source}: longer than {BYTES:,} characters')
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _count(node, {}) > VALUES:
            raise UserError(f'{source}: holds more than {VALUES:,} values')
        _check_names(node, source)
        content = yaml.safe_load(text) or {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f'{source}: not a mapping of names to values')
    return content


def _check_names(node: Optional[yaml.Node], source: str) -> None:
    """Complain of a name that stands there twice: YAML would take the last value and forget the others."""
    if isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f'{source}: {twice[0]} stands there twice')
        for _, value in node.value:
            _check_names(value, source)


def _count(node: yaml.Node, known: Dict[int, int]) -> int:
    """Values below a node, also those that aliases repeat; more than `VALUES` if it contains itself."""
    if id(node) not in known:
        known[id(node)] = VALUES + 1  # until it is known: what contains itself has no end
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]
