# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import Resize

from anomalib_recon.layers import AntialiasResize


@pytest.mark.parametrize("out_size", [(48, 48), (32, 57), (129, 31)])
@pytest.mark.parametrize("in_size", [(48, 48), (33, 47), (200, 131), (7, 300), (1, 2)])
def test_resize_is_torchs_antialiased_bilinear_resize(in_size, out_size):
    image = torch.rand(2, 3, *in_size)
    resized = AntialiasResize(out_size)(image)
    expected = interpolate(image.double(), out_size, mode="bilinear", antialias=True).float()
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(resized, Resize(out_size, antialias=True)(image), rtol=0, atol=1e-5)


def test_resize_to_the_same_size_changes_nothing():
    image = torch.rand(2, 3, 63, 48)
    assert torch.equal(AntialiasResize((63, 48))(image), image)


def test_resize_refuses_integers():
    with pytest.raises(TypeError, match="uint8"):
        AntialiasResize((48, 40))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
