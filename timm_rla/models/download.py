"""Verified download: a file from the Hub whose hash is not that which the Hub names never stays in the cache."""
import os
import re
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

__all__ = ['fetch_weights']

SAFETENSORS = 'model.safetensors'  # what timm asks for first


def fetch_weights(hub_id: str, filename: Optional[str] = None, cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Bring a repository's weights into the cache, where timm will find them, and check them there.

    Args:
        hub_id: Repository, with `@revision` if it is not the default one.
        filename: File in it, `model.safetensors` if None.
        cache_dir: Cache of huggingface_hub if None.

    Raises:
        RuntimeError: The file is damaged. It has been removed: the next try downloads it anew.
        Exception: Whatever huggingface_hub raises if it can neither download the file nor find it in the cache.
    """
    repo_id, _, revision = hub_id.partition('@')
    filename = filename or SAFETENSORS
    try:
        link = hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:  # timm knows further names
        return
    blob = os.path.realpath(link)
    expected = os.path.basename(blob)  # large files are kept under their SHA-256
    if not re.fullmatch('[0-9a-f]{64}', expected):
        return
    with open(blob, 'rb') as f:
        found = sha_fileobj(f).hex()
    if found != expected:
        for path in {link, blob}:
            os.unlink(path)
        raise RuntimeError(
            f'{filename} of {hub_id} is damaged: its SHA-256 is {found}, not {expected}. It has been removed from the '
            'cache; try again')
