"""The commands of `timm-rla`: a module for each, with its options and `main(argv)`."""
