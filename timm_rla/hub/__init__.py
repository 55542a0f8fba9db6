"""Publishing on the Hugging Face Hub: `timm-rla export` and `timm-rla push`."""
