"""Tensor operations with a fast form: each has a naive reference beside it, and none knows a model."""
