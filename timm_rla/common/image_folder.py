"""Folders of images: which files are images of a class, and what is left out and why."""
import os
from collections import Counter, defaultdict
from typing import Any, Dict, List, Optional, Sequence, Set

from timm.data.readers.reader_image_folder import ReaderImageFolder

from .errors import UserError

__all__ = ['IMAGE_TYPES', 'check_folder', 'image_files', 'leave_out_hidden', 'left_out', 'shorten']

IMAGE_TYPES = (  # what Pillow reads; timm itself takes the first three
    '.png', '.jpg', '.jpeg', '.jfif', '.webp', '.avif', '.bmp', '.tif', '.tiff', '.gif', '.jp2', '.ppm', '.pgm', '.pbm',
    '.tga',
)
SAME = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'))  # names of one split, for timm
SPLITS = (*SAME, ('test', 'testing'))  # what is a split, whatever it is called
SHOWN = 5  # names in a line


def check_folder(root: Optional[str], split: str, option: str) -> None:
    """Complain of a folder where timm would not find the split, or would take all splits for classes of one.

    Args:
        root: The folder, or a file, which timm's readers of archives take.
        split: Name of the split.
        option: What names the split. With --split `root` may be a split itself; with others it must hold its splits.

    Raises:
        UserError: It is missing, empty or not laid out like this.
    """
    if not root:
        raise UserError('--data-dir: not given, where is the dataset?')
    if not os.path.exists(root):
        raise UserError(f'--data-dir {root}: no such folder')
    if os.path.isfile(root):
        return
    names = next((names for names in SAME if split in names), (split,))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if split in folders or set(names) & set(folders):
        return
    splits = [name for name in folders if any(name in names for names in SPLITS) and _holds_folders(root, name)]
    if not folders or splits or option != '--split':
        found = f'holds {shorten(folders)}' if folders else 'holds no folders'
        others = [name for name in splits if (name in SAME[0]) == (option == '--train-split')]
        hint = f'; {option} {others[0]} takes that one' if others and split not in SAME[0] else ''
        hint += f"; {option} '' leaves it out" if option == '--val-split' else ''
        raise UserError(f'--data-dir {root}: {found}, where a folder {" or ".join(names)} is expected{hint}')


def _holds_folders(root: str, name: str) -> bool:
    return any(entry.is_dir() for entry in os.scandir(os.path.join(root, name)))


def shorten(names: Sequence[Any]) -> str:
    """The first of some names, for one line."""
    return ', '.join(map(str, names[:SHOWN])) + (', ...' if len(names) > SHOWN else '')


def image_files(dataset: Any) -> List[str]:
    """Files of a dataset's images; empty where they lie in no files of their own."""
    reader = getattr(dataset, 'reader', None)
    return [file for file, _ in reader.samples] if isinstance(reader, ReaderImageFolder) else []


# What is left out -------------------------------------------------------------------------------------------------

def _is_hidden(folder: str) -> bool:
    """True for a path, relative to the folder of the images, with a hidden folder in it, as programs leave them."""
    return any(part.startswith('.') and part != '.' for part in folder.split(os.sep))


def leave_out_hidden(reader: ReaderImageFolder, option: str, number_anew: bool) -> None:
    """Drop hidden files and those in hidden folders from timm's reader, and the classes that these alone would be.

    Args:
        reader: Changed in place.
        option: What names the folder, for the message.
        number_anew: Give the classes that stay the indices 0, 1, 2 and so on.

    Raises:
        UserError: No image is left.
    """
    folders = {os.path.dirname(file) for file, _ in reader.samples}  # of a million files
    hidden = {folder for folder in folders if _is_hidden(os.path.relpath(folder, reader.root))}
    samples = [(file, index) for file, index in reader.samples
               if os.path.dirname(file) not in hidden and not os.path.basename(file).startswith('.')]
    if len(samples) == len(reader.samples):
        return
    if not samples:
        raise UserError(f'{option}: {reader.root} has hidden images only')
    if number_anew:
        kept = {index for _, index in samples}
        old = {name: index for name, index in reader.class_to_idx.items() if index in kept}
        new = {index: number for number, index in enumerate(sorted(kept))}
        reader.class_to_idx = {name: new[index] for name, index in old.items()}
        samples = [(file, new[index]) for file, index in samples]
    reader.samples = samples


def left_out(reader: Any) -> str:
    """What of an image folder is left out and why, and which folders are one class: '; ...', or empty.

    Args:
        reader: Of a timm dataset; only readers of folders leave anything out.
    """
    if not isinstance(reader, ReaderImageFolder):
        return ''
    return _no_images(reader) + _put_together(reader)


def _put_together(reader: ReaderImageFolder) -> str:
    """Classes whose images lie in several folders: timm takes folders of one name for one class, wherever they lie."""
    folders: Dict[int, Set[str]] = defaultdict(set)
    for folder, index in {(os.path.dirname(file), index) for file, index in reader.samples}:
        folders[index].add(os.path.relpath(folder, reader.root))
    several = [' and '.join(sorted(names)) for names in folders.values() if len(names) > 1]
    return f'; folders that are one class, by their name: {shorten(several)}' if several else ''


def _no_images(reader: ReaderImageFolder) -> str:
    """What lies in an image folder and is no image of a class."""
    root, taken = reader.root, len(reader.samples)
    endings: Counter = Counter()
    without_images = []
    hidden, hidden_images = [], 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if _is_hidden(os.path.relpath(folder, root)):
            hidden.append(os.path.relpath(folder, root))
            subfolders.clear()
            continue
        hidden_images += sum(name.startswith('.') and name.lower().endswith(IMAGE_TYPES) for name in files)
        files = [os.path.splitext(name)[1].lower() for name in files if not name.startswith('.')]
        endings.update(files)
        if not subfolders and not set(files) & set(IMAGE_TYPES):
            without_images.append(os.path.relpath(folder, root))
    other = [f'{count} {ending or "without ending"}' for ending, count in sorted(endings.items())
             if ending not in IMAGE_TYPES]
    images = sum(count for ending, count in endings.items() if ending in IMAGE_TYPES)
    reasons = [
        f'left out as no images: {shorten(other)}' if other else '',
        f'left out as of no class of the network or class map: {images - taken}' if images > taken else '',
        f'hidden folders left out: {shorten(sorted(hidden))}' if hidden else '',
        f'hidden images left out: {hidden_images}' if hidden_images else '',
        f'folders without images: {shorten(sorted(without_images))}' if without_images else '',
    ]
    return ''.join(f'; {reason}' for reason in reasons if reason)
