"""`timm-rla push CHECKPOINT ORG/NAME`: publish a checkpoint on the Hugging Face Hub."""
import tempfile
from pathlib import Path
from typing import List, Optional

from huggingface_hub import CommitOperationAdd, HfApi
from timm.utils import setup_default_logging

from ..errors import UserError
from ..train.options import OptionParser
from ..version import __version__
from .export import add_options, export

__all__ = ['main', 'push']


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    parser = OptionParser(prog='timm-rla push', description='Publish a checkpoint on the Hugging Face Hub.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run')
    parser.add_argument('repo_id', metavar='ORG/NAME', help='repository, made if it is not there')
    add_options(parser)
    parser.add_argument('--private', action='store_true', help='make a private repository')
    parser.add_argument('--revision', metavar='BRANCH', help='branch, the default one if not given')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--token', help='access token, that of `hf auth login` if not given')
    parser.add_argument('--dry-run', action='store_true', help='show what would be sent, and send nothing')
    args = parser.parse_args(argv)
    setup_default_logging()
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(
            Path(args.checkpoint),
            Path(temporary) / 'export',
            use_ema=args.use_ema,
            dataset_name=args.dataset_name,
            license_id=args.license,
            repo_id=args.repo_id,
        )
        for path in sorted(folder.iterdir()):
            print(f'{path.stat().st_size:>12,}  {path.name}')
        if args.dry_run:
            print(f'\nNothing was sent to {args.repo_id}. The model card:\n\n{(folder / "README.md").read_text()}')
            return
        print(push(folder, args.repo_id, args.private, args.revision, args.create_pr, args.token))


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
        private: Make it a private one.
        revision: Branch.
        create_pr: Open a pull request instead.
        token: Access token.

    Returns:
        Address of the commit or pull request.

    Raises:
        UserError: The Hub cannot be reached or refuses.
    """
    api = HfApi(token=token, library_name='timm_rla', library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.create_commit(  # one for all files, which upload_folder does not promise
            repo_id,
            [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())],
            commit_message='Upload with timm_rla',
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as e:  # the client hands on the errors of its HTTP library and of its storage
        raise UserError(f'push to {repo_id} failed, nothing was published: {" ".join(str(e).split())}') from e
    return commit.pr_url or commit.commit_url
