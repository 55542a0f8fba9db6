"""Optimizer and learning rate of a detector, by iteration."""
from dataclasses import dataclass, replace
from typing import List, Sequence, Tuple

import torch
from timm.optim import create_optimizer_v2
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR

from ..common.errors import blame
from ..common.optimizers import blame_optimizer

__all__ = ['Schedule']


@dataclass(frozen=True)
class Schedule:
    """Optimizer and learning rate by iteration."""
    iterations: int
    lr: float
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup_iterations: int = 0
    warmup_factor: float = 0.001
    opt: str = 'sgd'
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def scaled(self, base_batch_size: int, batch_size: int) -> 'Schedule':
        """For another number of images per iteration, by the linear rule: as many images, the same rate per image.

        Rule: `Accurate, Large Minibatch SGD` - https://arxiv.org/abs/1706.02677

        Args:
            base_batch_size: Images per iteration that this is for.
            batch_size: Images per iteration.
        """
        def times(iterations: int) -> int:
            return round(iterations * base_batch_size / batch_size)

        return replace(
            self,
            iterations=max(1, times(self.iterations)),
            lr=self.lr * batch_size / base_batch_size,
            milestones=tuple(map(times, self.milestones)),
            warmup_iterations=times(self.warmup_iterations),
        )

    def __str__(self) -> str:
        parts = [f'{self.iterations:,} iterations', f'{self.opt}, learning rate {self.lr:g}']
        if self.milestones:
            parts.append(f'times {self.gamma:g} at ' + ', '.join(f'{number:,}' for number in self.milestones))
        if self.warmup_iterations:
            parts.append(f'warm-up over {self.warmup_iterations:,}')
        return ', '.join(parts)

    def optimizer(self, model: torch.nn.Module) -> Tuple[torch.optim.Optimizer, LRScheduler]:
        """Optimizer of what is trained, all of it with weight decay, and its schedule.

        Raises:
            UserError: No such optimizer, or values that it or the schedule rejects.
        """
        with blame_optimizer(self.opt):
            optimizer = create_optimizer_v2(
                [p for p in model.parameters() if p.requires_grad], self.opt, lr=self.lr,
                weight_decay=self.weight_decay, momentum=self.momentum)
        schedules: List[LRScheduler] = [MultiStepLR(optimizer, list(self.milestones), self.gamma)]
        if self.warmup_iterations:
            with blame(f'--warmup-factor {self.warmup_factor}', ValueError):
                schedules.append(LinearLR(optimizer, self.warmup_factor, total_iters=self.warmup_iterations))
        return optimizer, ChainedScheduler(schedules)
