"""egmf-trainer: distributed training of Expert-Guided Multimodal Fusion (arXiv 2601.07565) with large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.serving.predictor import Predictor

__all__ = ["Predictor", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Public names are loaded when they are first asked for: the command line and `import trainer` stay light."""
    if name == "Predictor":
        from trainer.serving.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
