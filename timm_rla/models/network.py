"""Recurrent Layer Attention networks on top of timm's ResNet.

Paper: `Recurrent Layer Attention Network`, anonymous (withdrawn) submission to ICLR 2020 -
https://openreview.net/forum?id=Bke5aJBKvH

Beside the residual network runs one LSTM cell that all blocks share. Each block summarises the output of its last norm
layer, lets the cell take a step and scales its residual branch by what the block's own head infers from the hidden
state (blocks.py). The parameters that come on top are `lstm.*` and, in each block, `attention.*` and `context.*`; all
others keep the names that they have in timm.
"""
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType, to_ntuple
from timm.models.resnet import ResNet

from .._timm import feature_take_indices
from ..ops.lstm import CellWeights, FoldedCell, LSTMState, step_function
from ..ops.vanilla import is_vanilla
from .blocks import RecurrentBlock, RecurrentStage
from .fold import Folder, fold

__all__ = ['RLAResNet', 'RecurrentLayerAttention', 'default_context_dim']

STAGES = ('layer1', 'layer2', 'layer3', 'layer4')
RUN = ('forward', 'forward_features', 'run_stages', 'stem')  # methods that say in which order modules are called


def default_context_dim(widths: Sequence[int]) -> int:
    """Context length N that needs the fewest resamplings (appendix B): the most frequent block width.

    Args:
        widths: Output channels of each block; among equally frequent ones the upper median is taken.
    """
    counts = Counter(widths)
    frequent = sorted(width for width, count in counts.items() if count == max(counts.values()))
    return frequent[len(frequent) // 2]


class RecurrentLayerAttention(nn.Module):
    """What timm's ResNet, or a subclass with as many stages or fewer, gains: the shared LSTM and its state.

    Args:
        block: RLABasicBlock or RLABottleneck.
        layers: Number of blocks in each stage.
        channels: Planes of each stage.
        context: How a block is summarised, a key of `timm_rla.layers.CONTEXTS`.
        context_dim: N, length of that summary; the most frequent block width if None.
        hidden_dim: M, hidden units of the LSTM.
        reduction: r, a divisor of `hidden_dim`.
        vector: One attention value per channel (RLA-vector) instead of one per block.
        attn_layer: Intra-layer attention in each block (IA+RLA), any name that timm knows, such as 'se' or 'eca'.
        block_args: More arguments for each block.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        ValueError: `context`, `context_dim`, `hidden_dim`, `reduction` or `vector` is out of range.
    """
    def __init__(
            self,
            block: Type[RecurrentBlock],
            layers: Tuple[int, ...],
            channels: Tuple[int, ...] = (64, 128, 256, 512),
            context: str = 'gap',
            context_dim: Optional[int] = None,
            hidden_dim: int = 512,
            reduction: int = 16,
            vector: bool = False,
            attn_layer: Optional[LayerType] = None,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **kwargs,
    ):
        if context_dim is None:
            blocks = to_ntuple(len(channels))(block)  # one for all stages or one for each, as timm takes them
            context_dim = default_context_dim(
                [p * b.expansion for p, b, n in zip(channels, blocks, layers) for _ in range(n)])
        block_args = dict(
            block_args or {},
            context=context,
            context_dim=context_dim,
            hidden_dim=hidden_dim,
            reduction=reduction,
            vector=vector,
        )
        if attn_layer is not None:
            block_args.setdefault('attn_layer', attn_layer)
        dd = dict(device=device, dtype=dtype)
        super().__init__(block, layers, channels=channels, block_args=block_args, **kwargs, **dd)
        self.lstm = nn.LSTMCell(context_dim, hidden_dim, **dd)
        self.folded = False
        self.fc = self._modules.pop('fc')  # last again: timm tells the classifier's parameters by their order
        self._make_recurrent()

    def _make_recurrent(self) -> None:
        for name in STAGES:
            stage = getattr(self, name)
            if type(stage) in (nn.Sequential, nn.Identity):  # as timm makes and prunes it, nothing of somebody else's
                setattr(self, name, RecurrentStage(*stage.children()))
        self.layer1.reparameterize = Folder(self)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Called when a network is copied or unpickled."""
        super().__setstate__(state)
        for module in self.modules():
            folder = vars(module).get('reparameterize')
            if isinstance(folder, Folder) and folder.network() is None:
                module.reparameterize = Folder(self)

    @torch.jit.ignore
    def init_weights(self, **kwargs: Any) -> None:
        """Initialize model weights; anew also those that timm leaves to the layers' own initialisation.

        Args:
            **kwargs: Those of the network without layer attention. With `zero_init_last` the last norm in each residual
                branch is zero-initialized; every context is zero then.
        """
        if hasattr(self, 'lstm'):  # not under construction, but for instance after to_empty()
            for module in self.modules():
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
        super().init_weights(**kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, str]:
        """Create regex patterns for parameter grouping.

        LSTM, heads and contexts form one group that ranks after the blocks, which all feed it: with layer decay a warm
        start trains its new attention faster than the backbone that it has taken over.
        """
        return dict(
            stem=super().group_matcher(coarse=coarse)['stem'],
            blocks=r'^layer(\d+)\.%s\.(?!attention|context)' % (r'\d+' if coarse else r'(\d+)'),
            attention=r'^(?:lstm|layer\d+\.\d+\.(?:attention|context))',
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of each block."""
        super().set_grad_checkpointing(enable)
        for module in self.modules():  # a stage may be wrapped
            if isinstance(module, RecurrentStage):
                module.grad_checkpointing = enable

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input images [B, in_chans, H, W].
            indices: Take last n features if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to compatible intermediates (there is none).
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, NCHW.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        x, _, intermediates = self.run_stages(x, take_indices, max_index if stop_early else len(STAGES))
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates, as timm's ResNet does; returns the indices kept."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self._make_recurrent()
        if not any(getattr(self, name)._modules for name in STAGES):
            self.lstm = None  # nothing but the stem is left
        return take_indices

    @torch.jit.ignore
    def fold(self) -> None:
        """Multiply out what is constant in evaluation (fold.py); timm's `reparameterize_model` calls this."""
        own = all(getattr(type(self), name) is getattr(RLAResNet, name) for name in RUN)
        if own and is_vanilla(self, type(self)) and not self.folded:
            before = set(self.modules())
            fold(self.eval(), [getattr(self, name) for name in STAGES])
            self.folded = set(self.modules()) != before

    def train(self, mode: bool = True) -> 'RecurrentLayerAttention':
        """Set the mode.

        Raises:
            RuntimeError: Training mode of a folded network.
        """
        if mode and self.folded:
            raise RuntimeError(
                'this network is folded for inference (reparameterize_model): its norms are part of its convolutions '
                'and its LSTM of constant matrices, so it cannot be trained; train the network it was made from')
        return super().train(mode)

    def step(self) -> CellWeights:
        """The LSTM for one forward pass: the module, or what computes the same (`ops.lstm.step_function`)."""
        if not torch.jit.is_scripting():
            return step_function(self.lstm)
        if self.lstm is None:  # no block is left to take a step
            return CellWeights(None, torch.empty(0), None)
        elif hasattr(self.lstm, 'weight_ih'):  # of three branches TorchScript compiles one
            return CellWeights(self.lstm.weight_ih, self.lstm.weight_hh, self.lstm.bias_ih + self.lstm.bias_hh)
        else:
            return CellWeights(None, self.lstm.weight_hh, None)

    @torch.jit.unused
    def __prepare_scriptable__(self) -> 'RecurrentLayerAttention':
        """Called by torch.jit.script, which can compile the formula of the LSTM but not pass on the module.

        Raises:
            RuntimeError: The LSTM is not what the formula computes.
        """
        kind = FoldedCell if isinstance(self.lstm, FoldedCell) else nn.LSTMCell
        if self.lstm is not None and not is_vanilla(self.lstm, kind):
            raise RuntimeError(
                f'TorchScript takes the LSTM only as a plain {kind.__name__} without hooks, not as '
                f'{type(self.lstm).__name__}: unchanged, unpruned and without parametrizations')
        return self

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """All before the pooling in front of the first stage: [B, in_chans, H, W] -> [B, C, H', W']"""
        return self.act1(self.bn1(self.conv1(x)))

    def run_stages(
            self,
            x: torch.Tensor,
            take: List[int],
            last: int,
    ) -> Tuple[torch.Tensor, Optional[LSTMState], List[torch.Tensor]]:
        """Stem and stages.

        Args:
            x: Input images [B, in_chans, H, W].
            take: Feature maps to return, 0 for that of the stem, 1 to 4 for those of the stages.
            last: Last stage to run, 1 to 4, or 0 for none.

        Returns:
            Output of the last stage, the state of its last block (None without blocks), and the feature maps to take,
            in the order of the network.
        """
        taken: List[torch.Tensor] = []
        x = self.stem(x)
        if 0 in take:
            taken.append(x)
        x = self.maxpool(x)

        step = self.step()
        state: Optional[LSTMState] = None  # h_0 = c_0 = 0, anew in every forward pass
        if last >= 1:
            x, state = self.layer1(x, state, step)
            if 1 in take:
                taken.append(x)
        if last >= 2:
            x, state = self.layer2(x, state, step)
            if 2 in take:
                taken.append(x)
        if last >= 3:
            x, state = self.layer3(x, state, step)
            if 3 in take:
                taken.append(x)
        if last >= 4:
            x, state = self.layer4(x, state, step)
            if 4 in take:
                taken.append(x)
        return x, state, taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, H, W] -> [B, C, H / output_stride, W / output_stride]"""
        return self.run_stages(x, take=[], last=4)[0]


class RLAResNet(RecurrentLayerAttention, ResNet):
    """Recurrent Layer Attention ResNet. Takes the arguments of `RecurrentLayerAttention` and of timm's ResNet."""
