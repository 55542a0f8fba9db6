"""`python -m timm_rla`, the same as `timm-rla`."""
import sys

from timm_rla_cli import main

if __name__ == '__main__':
    sys.exit(main())
