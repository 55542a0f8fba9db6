"""Mean and variance of a stream, for each class, merged exactly whatever the parts."""
from dataclasses import dataclass
from typing import Sequence

import torch

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
        return cls._merged(*(torch.stack([getattr(part, name) for part in parts])
                             for name in ('count', 'mean', 'deviation')))

    @classmethod
    def _merged(cls, counts: torch.Tensor, means: torch.Tensor, deviations: torch.Tensor) -> 'Moments':
        """Of P parts: [P, K], [P, K, L] and [P, K, L]."""
        counts = counts[:, :, None]
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total.clamp(min=1)
        return cls(total[:, 0], mean, (deviations + counts * (means - mean) ** 2).sum(0))

    def add(self, values: torch.Tensor, groups: torch.Tensor) -> None:
        """Take in a batch, in place. Only the groups that are in it cost anything: there may be very many.

        Args:
            values: [B, L].
            groups: Group of each vector, [B], in [0, K).
        """
        present, groups = groups.detach().cpu().unique(return_inverse=True)
        merged = Moments.merge([
            Moments(self.count[present], self.mean[present], self.deviation[present]),
            Moments.of(values, groups, len(present)),
        ])
        self.count[present], self.mean[present], self.deviation[present] = merged.count, merged.mean, merged.deviation

    def over_groups(self) -> 'Moments':
        """Moments of all vectors, whatever their group: K = 1."""
        return Moments._merged(self.count[:, None], self.mean[:, None], self.deviation[:, None])

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation of the vectors as a population [K, L]; nan where there are none."""
        return (self.deviation / self.count[:, None]).sqrt()
