"""Other samplers, loaded as installed: what fastdiff is compared with."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

__all__ = ["k_diffusion_sampling"]


def k_diffusion_sampling() -> Any | None:
    """The sampling module of the installed k-diffusion, without the packages only its training needs.

    Returns: the module, or None where k-diffusion (or scipy, tqdm) is not installed.
    """
    name = "_k_diffusion"
    if f"{name}.sampling" in sys.modules:
        return sys.modules[f"{name}.sampling"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        return None
    folder = found.submodule_search_locations[0]
    package, utils = types.ModuleType(name), types.ModuleType(f"{name}.utils")
    package.__path__ = [folder]
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    stubs = {}  # imported at the top, used by its Brownian-tree and likelihood functions only
    for missing, attribute in (("torchsde", "BrownianTree"), ("torchdiffeq", "odeint")):
        if missing not in sys.modules and importlib.util.find_spec(missing) is None:
            stubs[missing] = types.ModuleType(missing)
            setattr(stubs[missing], attribute, None)
    sys.modules.update({name: package, f"{name}.utils": utils, **stubs})
    spec = importlib.util.spec_from_file_location(f"{name}.sampling", f"{folder}/sampling.py")
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{name}.sampling"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[f"{name}.sampling"]
        return None
    finally:
        for missing in stubs:
            del sys.modules[missing]
    return module
