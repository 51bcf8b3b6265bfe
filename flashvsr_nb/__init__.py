"""Streaming video super-resolution after FlashVSR, built step by step in notebooks.

The names below load their module, and with it torch, at first use; `import flashvsr_nb` alone loads neither.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOME = {"FlashVSR": "pipeline", "ModelConfig": "dit", "attend": "attention"}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(f".{_HOME[name]}", __name__), name))


def __dir__():
    return sorted({*globals(), *__all__})
