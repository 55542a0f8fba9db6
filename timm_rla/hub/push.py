"""Publishing a folder on the Hugging Face Hub."""
from pathlib import Path
from typing import Optional

from huggingface_hub import CommitOperationAdd, HfApi

from ..common.errors import UserError, one_line
from ..version import __version__

__all__ = ['push']


def push(
        folder: Path,
        repo_id: str,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
        token: Optional[str] = None,
) -> str:
    """Send a folder to a repository as one commit: it is there as a whole or not at all, and can be sent again.

    Files that the Hub has got already are not sent a second time.

    Args:
        folder: As from `export`.
        repo_id: Repository, made if it is not there.
        private: Make it a private one; one that is there must be private. Else it is as its owner's settings have it.
        revision: Branch, made if it is not there.
        create_pr: Open a pull request instead.
        token: Access token.

    Returns:
        Address of the commit or pull request.

    Raises:
        UserError: The Hub cannot be reached or refuses, or the repository is a public one and should not be.
    """
    api = HfApi(token=token, library_name='timm_rla', library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise UserError(f'--private: {repo_id} is there, and public; nothing was published')
        if revision and not create_pr and not revision.startswith('refs/'):  # of a pull request, which is there
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(  # one for all files, which upload_folder does not promise
            repo_id,
            [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())],
            commit_message='Upload with timm_rla',
            revision=revision,
            create_pr=create_pr,
        )
    except UserError:
        raise
    except Exception as e:  # the client hands on the errors of its HTTP library and of its storage
        raise UserError(f'push to {repo_id} failed, nothing was published: {one_line(e)}') from e
    return commit.pr_url or commit.commit_url
