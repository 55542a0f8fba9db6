"""`timm-rla train`: train a model, with the options of timm's train.py."""
from typing import List, Optional

from ..common.options import parse
from ..train.options import train_parser
from ..train.run import train

__all__ = ['main']


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    train(parse(train_parser(), argv))
