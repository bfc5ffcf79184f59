"""Imports of the packages that only reports need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import a module of the ``report`` extra.

    Args:
      module: the module's full name, such as ``"matplotlib.figure"``.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'reports need {package}: pip install "cbp-jax[report]"') from error
