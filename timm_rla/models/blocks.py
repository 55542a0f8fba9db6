"""Residual blocks and stages with layer attention.

They change timm's in two points. A block is called as `block(x, state, step)` and returns `(x, state)`, and so is a
stage: state and weights of the LSTM travel in arguments, nothing of a forward pass stays on a module. And behind the
last convolution comes layer attention (`RecurrentBlock.attend`). docs/design.md tells which form runs when.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath, SEModule
from timm.models import checkpoint
from timm.models.resnet import BasicBlock, Bottleneck

from .._torch import comes_from_reentrant_checkpoint
from ..layers import Context, LayerAttention
from ..ops.gated_norm import GatedNorm, gated_norm
from ..ops.lstm import CellWeights, LSTMState
from ..ops.vanilla import is_vanilla

__all__ = ['RLABasicBlock', 'RLABottleneck', 'RecurrentBlock', 'RecurrentStage', 'is_pointwise']


def is_pointwise(layer: nn.Module) -> bool:
    """Vanilla 1x1, stride-1, unpadded, ungrouped Conv2d: commutes with average pooling."""
    return (
        is_vanilla(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def _uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _excitation(se: SEModule, pooled: torch.Tensor) -> torch.Tensor:
    """The factors by which an SE module multiplies the channels, from its pooled input: [B, C] -> [B, C]"""
    x = se.act(se.bn(se.fc1(pooled[:, :, None, None])))
    return se.gate(se.fc2(x)).flatten(1)


def _check_gradient(x: torch.Tensor, state: Optional[LSTMState]) -> None:
    """Complain of a state whose gradient checkpointing has dropped, which would make others silently wrong.

    Raises:
        RuntimeError: A reentrant checkpoint returned input and state, and only the input has a gradient.
    """
    if state is not None and comes_from_reentrant_checkpoint(x) and not state[0].requires_grad:
        raise RuntimeError(
            'the state of the previous block has lost its gradient: checkpointing with use_reentrant=True drops it, '
            'set_grad_checkpointing() or use_reentrant=False keeps it')


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
        if vector not in (False, True):  # a text such as 'no' would be taken for True
            raise ValueError(f'vector must be False or True, not {vector!r}')
        channels = planes * self.expansion
        self.context = Context(channels, context_dim, context, **dd)
        self.attention = LayerAttention(hidden_dim, reduction, channels if vector else 1, **dd)

    def attend(
            self,
            x: torch.Tensor,
            z: torch.Tensor,
            shortcut: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """Norm, layer attention, shortcut and activation (eq. 2 to 6).

        Args:
            x: Input of the last convolution [B, C', H, W].
            z: Its output [B, C, H, W].
            shortcut: Input of the block.
            state: State of the previous block, None for the first.
            step: The LSTM, as `RecurrentLayerAttention.step` returns it.

        Returns:
            Output of the block [B, C, H, W], its state.
        """
        if not torch.jit.is_scripting():
            _check_gradient(shortcut, state)
            fused = self.fused_norm(z)
            if fused is not None:
                return self.attend_fused(fused, shortcut, state, step)

        features = self.last_norm(z)
        state = step(self.context(self.pool(x, features)), state)
        attention = self.attention(state[0])  # [B, 1] or [B, C]

        if self.se is not None:
            features = self.se(features)
        if self.drop_path is not None:
            features = self.drop_path(features)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.last_act(torch.addcmul(shortcut, features, attention[:, :, None, None])), state

    def pool(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What the context is made of: [B, C] from the output of the norm, before any intra-layer attention.

        Where last convolution and norm commute with pooling, from the smaller input x of the convolution.
        """
        if self.context.before_last_conv:  # the context of a folded network stands for both
            return self.context.pool(x)
        if not torch.jit.is_scripting():
            if self.commutes_with_pooling():
                return self.last_norm(self.last_conv(self.context.pool(x)[:, :, None, None])).flatten(1)
        return self.context.pool(features)

    def attend_fused(
            self,
            norm: GatedNorm,
            shortcut: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """The same, with all that scales channels or images as one gate."""
        pooled = norm.max_pooled() if self.context.max_pool else norm.mean_pooled()
        state = step(self.context(pooled), state)
        gate = self.attention(state[0])
        if self.se is not None:
            gate = gate * _excitation(self.se, norm.mean_pooled())
        if self.drop_path is not None:
            gate = self.drop_path(gate)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return norm.gate_and_add(gate, shortcut), state

    def fused_norm(self, z: torch.Tensor) -> Optional[GatedNorm]:
        """The last norm, fused with what follows, if none of these modules must be called."""
        _, norm, act = self.tail()
        takes_over = (
            is_vanilla(norm, nn.BatchNorm2d)
            and _uses_batch_statistics(norm)
            and norm.weight is not None
            and norm.bias is not None
            and is_vanilla(act, nn.ReLU)
            and (self.se is None or (is_vanilla(self.se, SEModule) and not self.se.add_maxpool))
            and (self.drop_path is None or is_vanilla(self.drop_path, DropPath))
        )
        return gated_norm(z, norm) if takes_over else None

    def commutes_with_pooling(self) -> bool:
        """True where pooling comes before last convolution and norm: compiled, in evaluation, if they are linear."""
        conv, norm, _ = self.tail()
        return (
            torch.compiler.is_compiling()
            and not self.context.max_pool
            and is_pointwise(conv)
            and is_vanilla(norm, nn.BatchNorm2d)
            and not _uses_batch_statistics(norm)
        )


class RLABasicBlock(RecurrentBlock, BasicBlock):
    """timm's BasicBlock with layer attention."""

    def tail(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Last convolution, last norm and last activation."""
        return self.conv2, self.bn2, self.act2

    # TorchScript compiles calls of these three, but no tuple of modules
    def last_conv(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(x)

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(x)

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """[B, C_in, H, W], state of the previous block (None for the first) -> [B, C, H', W'], state of this block"""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)

        return self.attend(x, self.conv2(x), shortcut, state, step)


class RLABottleneck(RecurrentBlock, Bottleneck):
    """timm's Bottleneck with layer attention."""

    def tail(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Last convolution, last norm and last activation."""
        return self.conv3, self.bn3, self.act3

    def last_conv(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(x)

    def last_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn3(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, LSTMState]:
        """[B, C_in, H, W], state of the previous block (None for the first) -> [B, C, H', W'], state of this block"""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)

        return self.attend(x, self.conv3(x), shortcut, state, step)


class RecurrentStage(nn.Sequential):
    """A stage of recurrent blocks. Without blocks, as pruning leaves it, it passes everything on."""

    def __init__(self, *blocks: RecurrentBlock):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, Optional[LSTMState]]:
        """[B, C_in, H, W], state before the stage, the LSTM -> [B, C, H', W'], state of the last block"""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                # the reentrant kind passes no gradient through the state, a tuple
                x, state = checkpoint(block, x, state, step, use_reentrant=False)
            else:
                x, state = block(x, state, step)
        return x, state
