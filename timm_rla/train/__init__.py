"""Training built from timm's parts: `timm-rla train`."""
