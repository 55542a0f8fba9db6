"""`timm-rla push CHECKPOINT ORG/NAME`: publish a checkpoint on the Hugging Face Hub."""
import tempfile
from pathlib import Path
from typing import List, Optional

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..common.errors import UserError, blame
from ..common.options import OptionParser
from ..hub.export import export
from ..hub.push import push
from .export import add_export_options

__all__ = ['main']


def push_parser() -> OptionParser:
    parser = OptionParser(prog='timm-rla push', description='Publish a checkpoint on the Hugging Face Hub.')
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run')
    add('repo_id', metavar='ORG/NAME', help='repository, made if it is not there')
    add_export_options(add)
    add('--private', action='store_true', help='make a private repository; one that is there must be private')
    add('--revision', metavar='BRANCH', help='branch, made if it is not there; the default one if not given')
    add('--create-pr', action='store_true', help='open a pull request instead of committing')
    add('--token', help='access token, that of `hf auth login` if not given')
    add('--dry-run', action='store_true', help='show what would be sent, and send nothing')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = push_parser().parse_args(argv)
    with blame('ORG/NAME', HFValidationError):
        validate_repo_id(args.repo_id)
    if '/' not in args.repo_id:  # the card says how to load it, by its whole name
        raise UserError(f'ORG/NAME {args.repo_id}: the name of a user or an organization is missing, as in '
                        f'someone/{args.repo_id}')
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
            card = (folder / 'README.md').read_text(encoding='utf-8')
            print(f'\nNothing was sent to {args.repo_id}. The model card:\n\n{card}')
            return
        print(push(folder, args.repo_id, args.private, args.revision, args.create_pr, args.token))
