"""Recurrent Layer Attention networks. Importing this registers them with timm."""
from . import resnet as resnet
from .blocks import RLABasicBlock as RLABasicBlock
from .blocks import RLABottleneck as RLABottleneck
from .cifar import CifarResNet as CifarResNet
from .cifar import RLACifarResNet as RLACifarResNet
from .rla import RecurrentLayerAttention as RecurrentLayerAttention
from .rla import RLAResNet as RLAResNet
