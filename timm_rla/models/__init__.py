"""Recurrent Layer Attention networks. Importing this registers them with timm."""
from .cifar import CifarResNet, RLACifarResNet
from .resnet import *
from .rla import RLABasicBlock, RLABottleneck, RLAResNet, RecurrentLayerAttention
