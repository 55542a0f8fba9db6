"""`timm-rla detect train`."""
from typing import List

from ...common.options import parse
from ..options import train_parser
from ..run import train

__all__ = ['main']


def main(argv: List[str]) -> None:
    """Command line."""
    train(parse(train_parser(), argv))
