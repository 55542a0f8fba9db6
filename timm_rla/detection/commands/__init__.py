"""The actions of `timm-rla detect`."""
