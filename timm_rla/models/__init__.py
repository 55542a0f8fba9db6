"""Recurrent Layer Attention networks. Importing this registers them with timm."""
from . import resnet as resnet
from .cifar import CifarResNet as CifarResNet
from .cifar import RLACifarResNet as RLACifarResNet
from .rla import RecurrentLayerAttention as RecurrentLayerAttention
from .rla import RLABasicBlock as RLABasicBlock
from .rla import RLABottleneck as RLABottleneck
from .rla import RLAResNet as RLAResNet
