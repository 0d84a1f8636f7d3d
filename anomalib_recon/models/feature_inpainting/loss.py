# SPDX-License-Identifier: Apache-2.0

"""What the prediction misses. It is only logged: the prediction is fitted in closed form."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualLoss(nn.Module):
    """Mean square of the residual; somewhat below 1 if nothing is predicted, as features are whitened."""

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Compare whitened features of shape ``(B, C, h, w)`` with their prediction; the result is a scalar."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.mse_loss(reconstruction.float(), features.float())
