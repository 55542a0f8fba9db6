"""Batch norm, gate, shortcut and ReLU as one operation, whose gate may depend on the pooled output of the norm."""
from .fused import GatedNorm as GatedNorm
from .fused import form as form
from .fused import gated_norm as gated_norm
from .fused import set_form as set_form
from .reference import GatedNormReference as GatedNormReference
