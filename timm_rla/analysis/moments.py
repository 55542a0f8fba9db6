"""Mean and variance of a stream, for each class, merged exactly whatever the parts."""
from dataclasses import dataclass
from typing import Sequence

import torch
import torch.distributed as dist

__all__ = ['Moments']


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of vectors of length L in K groups, in float64 on the CPU.

    Merging is that of Chan, Golub and LeVeque: deviations from the common mean, never a difference of large sums.
    """
    count: torch.Tensor  # [K]
    mean: torch.Tensor  # [K, L], 0 where count is 0
    deviation: torch.Tensor  # [K, L], sum of squared deviations from the mean

    @classmethod
    def of(cls, values: torch.Tensor, groups: torch.Tensor, num_groups: int) -> 'Moments':
        """Moments of a batch.

        Args:
            values: [B, L].
            groups: Group of each vector, [B], in [0, num_groups).
            num_groups: K.
        """
        values, groups = values.detach().cpu().double(), groups.detach().cpu()
        empty = values.new_zeros(num_groups, values.shape[1])
        count = torch.bincount(groups, minlength=num_groups).double()
        mean = empty.index_add(0, groups, values) / count.clamp(min=1)[:, None]
        return cls(count, mean, empty.index_add(0, groups, (values - mean[groups]) ** 2))

    @classmethod
    def merge(cls, parts: Sequence['Moments']) -> 'Moments':
        """Moments of all vectors of several parts with the same groups."""
        counts = torch.stack([part.count for part in parts])[:, :, None]  # [P, K, 1]
        means = torch.stack([part.mean for part in parts])  # [P, K, L]
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total.clamp(min=1)
        deviation = sum(part.deviation for part in parts) + (counts * (means - mean) ** 2).sum(0)
        return cls(total[:, 0], mean, deviation)

    def over_groups(self) -> 'Moments':
        """Moments of all vectors, whatever their group: K = 1."""
        return Moments.merge([Moments(*group) for group in zip(*(
            tensor.split(1) for tensor in (self.count, self.mean, self.deviation)))])

    def over_processes(self) -> 'Moments':
        """Moments of the vectors of all processes; the same on each."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self)
        return Moments.merge(parts)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation of the vectors as a population [K, L]; nan where there are none."""
        return (self.deviation / self.count[:, None]).sqrt()
