"""Verified download: a file from the Hub whose hash is not that which the Hub names never stays in the cache."""
import os
import re
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

__all__ = ['fetch_weights']

WEIGHTS = ('model.safetensors', 'pytorch_model.bin')  # what timm asks for, in this order


def fetch_weights(hub_id: str, filename: Optional[str] = None, cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Bring a repository's weights into the cache, where timm will find them, and check them there.

    Args:
        hub_id: Repository, with `@revision` if it is not the default one.
        filename: File in it, that which timm takes if None.
        cache_dir: Cache of huggingface_hub if None.

    Raises:
        RuntimeError: The file is damaged. It has been removed: the next try downloads it anew.
        OSError: huggingface_hub can neither download the file nor find it in the cache.
    """
    repo_id, _, revision = hub_id.partition('@')
    missing = None
    for name in [filename] if filename else WEIGHTS:
        try:
            link = hf_hub_download(
                repo_id,
                name,
                revision=revision or None,
                cache_dir=cache_dir,
                local_files_only=isinstance(missing, LocalEntryNotFoundError),  # no connection: once is enough
            )
        except EntryNotFoundError as e:
            missing = missing or e
        except (OSError, ValueError):
            raise
        except Exception as e:  # the errors of its HTTP library, which are no OSError, are handed on by the client
            raise ConnectionError(f'{name} of {hub_id}: {" ".join(str(e).split()) or type(e).__name__}') from e
        else:
            return _check(Path(link), f'{name} of {hub_id}')
    raise missing


def _check(link: Path, subject: str) -> None:
    if not link.is_symlink():  # a file system without links: the hash is not kept
        return
    # The file that the link names may itself be a link, into a store of all repositories where names are other hashes
    blob = link.parent / os.readlink(link)
    if not re.fullmatch('[0-9a-f]{64}', blob.name):  # large files are kept under their SHA-256
        return
    with open(blob, 'rb') as f:
        found = sha_fileobj(f).hex()
    if found != blob.name:
        for path in (Path(os.path.realpath(blob)), blob, link):
            path.unlink(missing_ok=True)
        raise RuntimeError(
            f'{subject} is damaged: its SHA-256 is {found}, not {blob.name}. It has been removed from the cache; '
            'try again')
