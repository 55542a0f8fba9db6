"""Optimizer and learning rate of a detector, by iteration."""
from dataclasses import dataclass, replace
from typing import Sequence

import torch
from timm.optim import create_optimizer_v2

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

    def rate(self, iteration: int) -> float:
        """Learning rate of an iteration, counted from 0.

        It is a function of nothing else: a run that goes on needs no state of it.
        """
        rate = self.lr * self.gamma ** sum(milestone <= iteration for milestone in self.milestones)
        if iteration < self.warmup_iterations:
            rate *= self.warmup_factor + (1 - self.warmup_factor) * iteration / self.warmup_iterations
        return rate

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Optimizer of what is trained, all of it with weight decay.

        Raises:
            UserError: No such optimizer, or values that it rejects.
        """
        with blame_optimizer(self.opt):
            return create_optimizer_v2(
                [p for p in model.parameters() if p.requires_grad], self.opt, lr=self.lr,
                weight_decay=self.weight_decay, momentum=self.momentum)
