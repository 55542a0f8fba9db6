"""Names of the classes of a model: those of a dataset, or of ImageNet."""
import logging
from typing import Any, Dict, List, Optional, Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset

from ..common.datasets import class_indices
from ..common.errors import UserError, closest

__all__ = ['class_names', 'find_class', 'short_name']

_logger = logging.getLogger(__name__)


def class_names(
        num_classes: int,
        dataset: Optional[Any] = None,
        label_names: Optional[Sequence[str]] = None,
) -> List[str]:
    """A name for each class, in short; its index as text where it has none.

    Args:
        num_classes: K.
        dataset: Dataset of timm or torchvision with the classes of the model.
        label_names: Names [K] that the model itself has kept. Without them and a dataset, models with as many classes
            as ImageNet or one of its larger sets have its classes.
    """
    by_index: Dict[int, str] = {index: str(name) for name, index in class_indices(dataset).items()}
    by_index.update(enumerate(label_names or []))
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    if subset is not None:
        info = ImageNetInfo(subset)
        synsets = info.label_names()
        if not by_index or set(by_index.values()) <= set(synsets):  # folders of ImageNet are named by synset
            return [info.label_name_to_description(by_index.get(i, synsets[i])) for i in range(num_classes)]
    return [by_index.get(i, str(i)) for i in range(num_classes)]


def find_class(text: str, names: List[str]) -> int:
    """Index of the class that a user means: a name, an index, or one of several names, such as 'tench, Tinca tinca'.

    A name wins, as where folders are named by numbers, and what it means is logged if it could mean an index, too.

    Raises:
        UserError: There is no such class, or more than one.
    """
    if names.count(text) == 1:
        index = names.index(text)
        if text.isdecimal() and int(text) != index and int(text) < len(names):
            _logger.warning(f'--class {text}: the class of that name, which has index {index}; the one with index '
                            f'{int(text)} is {names[int(text)]!r}')
        return index
    if text.lstrip('-').isdecimal():
        if not 0 <= int(text) < len(names):
            raise UserError(f'--class {text}: out of range, the model has classes 0 to {len(names) - 1}')
        return int(text)
    wanted = text.casefold()
    synonyms = [[name.casefold(), *name.casefold().split(', ')] for name in names]
    found = [i for i, known in enumerate(synonyms) if wanted in known]
    if len(found) > 1:
        raise UserError(f'--class {text}: several classes are named so, choose by index: {", ".join(map(str, found))}')
    if not found:
        hint = closest(wanted, {name for known in synonyms for name in known})
        raise UserError(f'--class {text or repr(text)}: no such class; {hint} (or an index, 0 to {len(names) - 1})')
    return found[0]


def short_name(name: str, length: int = 24) -> str:
    """The first of several names, cut to a length that a legend has room for."""
    name = name.split(', ')[0]
    return name if len(name) <= length else f'{name[:length - 1]}…'
