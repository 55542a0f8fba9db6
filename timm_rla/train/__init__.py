"""Training and validation built from timm's parts: `timm-rla train` and `timm-rla validate`."""
