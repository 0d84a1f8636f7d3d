# SPDX-License-Identifier: Apache-2.0

"""A device like Apple's, emulated on the CPU: it has no double precision, and its tensors do not mix with the CPU's."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class DeviceTensor(Tensor):
    """A tensor on the emulated device.

    Every operation on it gives another such tensor, or an error where a real device would raise one. ``cpu()``, and
    ``to()`` with a tensor of the CPU, bring it back.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if function == Tensor.cpu or (function == Tensor.to and type(args[1]) is Tensor):
                return result.as_subclass(Tensor)
        if function != Tensor.to and any(
            isinstance(value, Tensor) and not isinstance(value, cls) and value.dim() for value in tree_leaves(args)
        ):
            message = f"{function} got tensors of two devices"
            raise RuntimeError(message)
        if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_leaves(result)):
            message = f"{function} needs double precision, which the device has not"
            raise TypeError(message)
        return tree_map(lambda value: value.as_subclass(cls) if isinstance(value, Tensor) else value, result)


def on_device(tensor: Tensor) -> Tensor:
    """Bring a tensor to the emulated device."""
    return tensor.detach().as_subclass(DeviceTensor)
