# SPDX-License-Identifier: Apache-2.0

"""How anomalib finds the models and datamodules of this package by their short names.

anomalib knows a model or a datamodule once its class has been imported, and has no entry points that would announce
one. Importing :mod:`anomalib_recon.models` or :mod:`anomalib_recon.data` tells anomalib the rest (see :func:`publish`).
This module has them imported without being asked, as soon as ``anomalib.models`` or ``anomalib.data`` has been:

1. At the end of ``import torch``, torch calls the functions in the entry-point group ``torch.backends``; ours is
   :func:`autoload`. anomalib needs torch, so the call comes in time. It only installs a finder, which imports nothing
   and acts on modules of anomalib alone.
2. The import of ``anomalib.models`` ends with Python binding ``models`` in the package ``anomalib``. The finder has
   given that package a class that imports our models then. A hook on the module's loader would come too late: often it
   is ``import anomalib.models`` that imports torch, so its loader is at work already.

The environment variable ``ANOMALIB_RECON_AUTOLOAD=0`` switches this off. Full paths such as
``--model anomalib_recon.models.InTra`` work without it, short names after ``import anomalib_recon.models``.
"""

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

# the subpackages of anomalib that the subpackages of the same name here add to
EXTENDED = ("models", "data")


def autoload() -> None:
    """Make ``anomalib`` import our models and datamodules after its own; torch calls this when it is imported."""
    if os.environ.get("ANOMALIB_RECON_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _AnomalibWatcher())


def publish(name: str) -> None:
    """Add the names in ``__all__`` of a package of ours to the package of anomalib that it extends.

    ``class_path: InTra`` is looked up there, and ``class_path: anomalib_recon.models.InTra`` must be allowed there.

    Args:
        name (str): ``"anomalib_recon.models"`` or ``"anomalib_recon.data"``, which must have been imported.
    """
    ours = sys.modules[name]
    theirs = import_module(name.replace("anomalib_recon", "anomalib"))
    for public_name in ours.__all__:
        vars(theirs).setdefault(public_name, getattr(ours, public_name))
    if name == "anomalib_recon.models":
        theirs.ALLOWED_MODULES.add(name)


class _ExtendedPackage(ModuleType):
    """The package ``anomalib`` when it imports our subpackages after its own."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name not in EXTENDED:
            return
        try:
            import_module(f"anomalib_recon.{name}")
        except Exception as error:  # no fault of ours may keep anomalib from being imported
            message = f"anomalib goes without anomalib_recon.{name}, which cannot be imported: {error!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickle by name: cloudpickle does so for modules of exactly the built-in type only."""
        return import_module, (self.__name__,)


class _AnomalibWatcher:
    """A finder that finds nothing, but takes part as soon as a module inside ``anomalib`` is about to be imported."""

    def find_spec(self, fullname: str, *_: object) -> None:
        """Leave the module named ``fullname`` to the other finders."""
        anomalib = sys.modules.get("anomalib")
        if fullname.startswith("anomalib.") and type(anomalib) is ModuleType:
            anomalib.__class__ = _ExtendedPackage
