"""Residual blocks and stages with layer attention.

They change timm's in two points. A block is called as `block(x, state, weights)` and returns `(x, state)`, and so is a
stage: the state of the LSTM travels in arguments, nothing of a forward pass stays on a module. And what comes behind
the last convolution is one method, `RecurrentBlock.attend`, which has two forms with the same result: the general one,
for every option of timm and for whoever hooks the layers, and one that costs no memory pass (fused.py).
"""
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SEModule
from timm.models import checkpoint
from timm.models.resnet import BasicBlock, Bottleneck

from .._torch import in_plain_eager_mode, is_hooked
from ..fused import FusedNorm, fused_eval_norm, fused_norm
from ..layers import Context, LayerAttention, scale_and_add
from ..lstm import LSTMState, LSTMWeights, lstm_step
from .overwrite import downsample_over, may_overwrite, norm_over

__all__ = ['RLABasicBlock', 'RLABottleneck', 'RecurrentBlock', 'RecurrentStage', 'is_pointwise']


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer is a linear map of each position, which pooling may come before, and nobody looks at it."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and not is_hooked(layer)
    )


def _excitation(se: SEModule, pooled: torch.Tensor) -> torch.Tensor:
    """What an SE module multiplies each channel with, from the pooled features: [B, C] -> [B, C]"""
    x = se.act(se.bn(se.fc1(pooled[:, :, None, None])))
    return se.gate(se.fc2(x)).flatten(1)


class RecurrentBlock(nn.Module):
    """What a residual block of timm gains: a context, a layer attention and a state that passes through it."""

    def __init__(
            self,
            inplanes: int,
            planes: int,
            *args,
            context: str = 'gap',
            context_dim: int = 1024,
            hidden_dim: int = 512,
            reduction: int = 16,
            vector: bool = False,
            device=None,
            dtype=None,
            **kwargs,
    ):
        dd = dict(device=device, dtype=dtype)
        super().__init__(inplanes, planes, *args, **kwargs, **dd)
        channels = planes * self.expansion
        self.context = Context(channels, context_dim, context, **dd)
        self.attention = LayerAttention(hidden_dim, reduction, channels if vector else 1, **dd)
        self.gates: Optional[nn.Linear] = None  # pooled features -> LSTM gates, once the network is folded
        self.pools_first = False  # whether these are pooled before the last convolution

    def recur(
            self,
            pooled: torch.Tensor,
            state: Optional[LSTMState],
            weights: LSTMWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """Pooled features [B, C] -> layer attention [B, 1] or [B, C], state (eq. 2 to 4)"""
        if self.gates is None:
            state = lstm_step(self.context(pooled), state, weights)
        else:
            state = lstm_step(pooled, state, LSTMWeights(self.gates.weight, weights.weight_hh, self.gates.bias))
        return self.attention(state.h), state

    def attend(
            self,
            x: torch.Tensor,
            z: torch.Tensor,
            shortcut: torch.Tensor,
            state: Optional[LSTMState],
            weights: LSTMWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """Norm, layer attention, shortcut and activation (eq. 2 to 6), in the general form.

        Args:
            x: Input of the last convolution [B, C', H, W].
            z: Its output [B, C, H, W].
            shortcut: Input of the block.
            state: State of the previous block, None for the first.
            weights: Weights of the LSTM for this step.

        Returns:
            Output of the block [B, C, H, W], its state.
        """
        pooled: Optional[torch.Tensor] = None
        overwrite = False
        if torch.jit.is_scripting():
            features = self.last_norm(z)
        else:
            pooled = self.pool_early(x)
            fused = self.fused_norm(z, pooled)
            if fused is not None:
                return self.attend_fused(fused, shortcut, state, weights)
            conv, norm, _ = self.last_layers()
            features = norm_over(z, conv, norm)
            overwrite = may_overwrite(features, conv, norm, self.se)
        if pooled is None:  # from the output of the norm itself, before any intra-layer attention
            pooled = self.context.pool(x if self.pools_first else features)
        attention, state = self.recur(pooled, state, weights)

        if self.se is not None:
            features = self.se(features)
        if self.drop_path is not None:
            attention = self.drop_path(attention)  # which drops the branch and writes less
        if self.downsample is not None:
            shortcut = (
                self.downsample(shortcut) if torch.jit.is_scripting() else downsample_over(self.downsample, shortcut))
        return self.last_act(scale_and_add(features, attention, shortcut, overwrite)), state

    def attend_fused(
            self,
            norm: FusedNorm,
            shortcut: torch.Tensor,
            state: Optional[LSTMState],
            weights: LSTMWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """The same as `attend` with a norm that is not carried out but part of the last pass."""
        pooled = norm.max_pooled() if self.context.max_pool else norm.mean_pooled()
        gate, state = self.recur(pooled, state, weights)
        if self.se is not None:
            gate = gate * _excitation(self.se, norm.mean_pooled())
        if self.drop_path is not None:
            gate = self.drop_path(gate)
        if self.downsample is not None:
            shortcut = downsample_over(self.downsample, shortcut)
        return norm.gate_and_add(gate, shortcut), state

    def fused_norm(self, z: torch.Tensor, pooled: Optional[torch.Tensor]) -> Optional[FusedNorm]:
        """The last norm taken apart, if a block like this one has a fused form and nobody looks at what it hides."""
        _, norm, act = self.last_layers()
        plain = (
            type(act) is nn.ReLU
            and (self.se is None or (type(self.se) is SEModule and not self.se.add_maxpool))
            and not any(is_hooked(module) for module in (norm, act, self.se) if module is not None)
        )
        if not plain:
            return None
        fused = fused_norm(z, norm)
        if fused is None and self.se is None:  # its rounding would be another one, and a warm start not exact
            fused = fused_eval_norm(z, norm, pooled)
        return fused

    def pool_early(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Pooled features [B, C], in evaluation, from the smaller input of a last 1 x 1 convolution, if there is one.

        Average pooling, convolution and norm are linear then, so that pooling may come first. In eager mode it does if
        that touches less memory, which few small images do not let it; a compiler is to see one way for all sizes.
        """
        conv, norm, _ = self.last_layers()
        if (
            self.context.max_pool
            or not is_pointwise(conv)
            or type(conv.weight) not in (nn.Parameter, torch.Tensor)
            or type(norm) is not nn.BatchNorm2d
            or norm.training
            or norm.running_mean is None
            or is_hooked(norm)
        ):
            return None
        if in_plain_eager_mode(x):
            positions = x.shape[0] * x.shape[2] * x.shape[3]
            if conv.in_channels * (conv.out_channels + positions) > conv.out_channels * positions:
                return None
        pooled = F.linear(self.context.pool(x), conv.weight.flatten(1), conv.bias)
        return norm(pooled[:, :, None, None]).flatten(1)


class RLABasicBlock(RecurrentBlock, BasicBlock):
    """timm's BasicBlock with layer attention."""

    def last_layers(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Last convolution, last norm and last activation."""
        return self.conv2, self.bn2, self.act2

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(x)

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            weights: LSTMWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """[B, C_in, H, W], state of the previous block (None for the first) -> [B, C, H', W'], state of this block"""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x) if torch.jit.is_scripting() else norm_over(x, self.conv1, self.bn1)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        return self.attend(x, self.conv2(x), shortcut, state, weights)


class RLABottleneck(RecurrentBlock, Bottleneck):
    """timm's Bottleneck with layer attention."""

    def last_layers(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Last convolution, last norm and last activation."""
        return self.conv3, self.bn3, self.act3

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn3(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            weights: LSTMWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """[B, C_in, H, W], state of the previous block (None for the first) -> [B, C, H', W'], state of this block"""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x) if torch.jit.is_scripting() else norm_over(x, self.conv1, self.bn1)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x) if torch.jit.is_scripting() else norm_over(x, self.conv2, self.bn2)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        return self.attend(x, self.conv3(x), shortcut, state, weights)


class RecurrentStage(nn.Sequential):
    """A stage of recurrent blocks. Without blocks, as pruning leaves it, it passes everything on."""

    def __init__(self, *blocks: RecurrentBlock):
        super().__init__(*blocks)
        self.first = 0  # index of the first of them among all blocks of the network
        self.grad_checkpointing = False

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            weights: List[LSTMWeights],
    ) -> Tuple[torch.Tensor, Optional[LSTMState]]:
        """[B, C_in, H, W], state, weights for all blocks of the network -> [B, C, H', W'], state of the last block"""
        for i, block in enumerate(self, self.first):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                # the other kind passes no gradient through the state, a tuple
                x, state = checkpoint(block, x, state, weights[i], use_reentrant=False)
            else:
                x, state = block(x, state, weights[i])
        return x, state
