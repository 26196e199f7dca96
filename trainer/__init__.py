"""egmf-trainer: distributed training of Expert-Guided Multimodal Fusion (arXiv 2601.07565) with large language models."""

from __future__ import annotations

__version__ = "0.1.0"
