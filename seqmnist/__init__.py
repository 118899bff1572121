"""seqmnist: recurrent networks that read images as sequences, in JAX and Flax.

The names below are the interface for Python; each imports its module, and JAX, when it is first
used. README's section "Use it from Python" shows how to use them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers read
    from seqmnist.config import Config
    from seqmnist.errors import UserError
    from seqmnist.interface import epoch_batches, load_data
    from seqmnist.run import train
    from seqmnist.study.trained import load
    from seqmnist.training.steps import init_state, make_system, train_step

__version__ = "0.1.0"
__all__ = [
    "Config", "UserError", "load_data", "train", "load",
    "make_system", "init_state", "train_step", "epoch_batches",
]  # fmt: skip

_MODULES = {
    "Config": "config",
    "UserError": "errors",
    "load_data": "interface",
    "train": "run",
    "load": "study.trained",
    "make_system": "training.steps",
    "init_state": "training.steps",
    "train_step": "training.steps",
    "epoch_batches": "interface",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # from now on, it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
