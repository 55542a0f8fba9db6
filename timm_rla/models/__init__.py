"""Recurrent Layer Attention networks. Importing this registers them with timm."""
from . import registry as registry
from .blocks import RLABasicBlock as RLABasicBlock
from .blocks import RLABottleneck as RLABottleneck
from .cifar import CifarResNet as CifarResNet
from .cifar import RLACifarResNet as RLACifarResNet
from .network import RecurrentLayerAttention as RecurrentLayerAttention
from .network import RLAResNet as RLAResNet
