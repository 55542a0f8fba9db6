"""Mean and standard deviation, batch by batch and in parts, are those of numpy on everything."""
import numpy as np
import pytest
import torch

from timm_rla.analysis import Moments


@pytest.mark.parametrize('offset', [0, 1e8])  # there a difference of sums of squares has no correct digit
def test_moments_equal_numpy_on_everything(offset):
    generator = np.random.default_rng(0)
    values, groups = generator.normal(offset, 1, (500, 4)), generator.integers(0, 5, 500)
    groups[groups == 3] = 4  # one class has no image
    cuts = [0, 1, 2, 100, 100, 317, 500]
    parts = [Moments.of(torch.tensor(values[a:b]), torch.tensor(groups[a:b]), 5) for a, b in zip(cuts, cuts[1:])]
    streamed = parts[0]
    for part in parts[1:]:
        streamed = Moments.merge([streamed, part])
    added = Moments.of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 5)
    for a, b in zip(cuts, cuts[1:]):
        added.add(torch.tensor(values[a:b]), torch.tensor(groups[a:b]))
    for moments in (streamed, added, Moments.merge(parts)):
        for k in (0, 1, 2, 4):
            np.testing.assert_allclose(moments.mean[k], values[groups == k].mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(moments.std[k], values[groups == k].std(0), rtol=1e-7 if offset else 1e-12)
        assert moments.count.tolist() == [(groups == k).sum() for k in range(5)]
        assert moments.std[3].isnan().all()
        whole = moments.over_groups()
        assert whole.count.tolist() == [500]
        np.testing.assert_allclose(whole.mean[0], values.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(whole.std[0], values.std(0), rtol=1e-7 if offset else 1e-12)
