"""Images of more than 8 bits: the same picture as with 8, in every command; or one line."""
import numpy as np
import pytest
from PIL import Image

from timm_rla.common.datasets import DataSource, open_dataset
from timm_rla.common.errors import UserError
from timm_rla.common.images import read_image

GREYS = np.linspace(0, 255, 64).round().reshape(8, 8)


@pytest.mark.parametrize('name, pixels', [
    ('8.png', GREYS.astype(np.uint8)),
    ('16.png', (GREYS * 257).astype(np.uint16)),
    ('16.tif', (GREYS * 257).astype(np.uint16)),
    ('big.tif', (GREYS * 257).astype('>u2')),
    ('float.tif', (GREYS / 255).astype(np.float32)),
])
def test_same_picture(tmp_path, name, pixels):
    folder = tmp_path / 'validation' / 'a'
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / name)
    assert np.array_equal(np.asarray(read_image(folder / name).convert('RGB'))[..., 1], GREYS)
    dataset = open_dataset(DataSource(str(tmp_path)), 'validation')
    assert np.array_equal(np.asarray(dataset[0][0])[..., 1], GREYS)


@pytest.mark.parametrize('pixels, words', [
    (GREYS.astype(np.int32), '32 bits, whose white'),
    (GREYS.astype(np.float32), 'from 0 to 255, whose white'),
    ((GREYS / 255 - 0.1).astype(np.float32), 'from -0.1'),
    (np.full((8, 8), np.nan, np.float32), 'from nan'),
], ids=['int32', 'float 255', 'negative', 'nan'])
def test_white_is_not_known(tmp_path, pixels, words):
    folder = tmp_path / 'validation' / 'a'
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / 'x.tif')
    with pytest.raises(UserError, match=f'cannot read image .*x.tif: .*{words}'):
        read_image(folder / 'x.tif')
    with pytest.raises(UserError, match=f'cannot read image .*x.tif: .*{words}'):
        open_dataset(DataSource(str(tmp_path)), 'validation')[0]
