"""Which attention a backbone uses, and the few tokens that check at load time that it is right.

Shapes: V vocabulary, T tokens of a packed row.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.batch import Packing
from trainer.models.backbone.limits import has_experts
from trainer.models.backbone.loading import BackboneError
from trainer.models.backbone.packed import CAUSAL_ONLY, HALF, MASKED, NAME, PackedRow, PrefixCache, install
from trainer.models.backbone.sharded import is_partitioned

log = logging.getLogger(__name__)

PREFIX, LENGTHS = 2, (1, 3)  # of the packed row of the probe
ROUNDING, ROUNDING_HALF = {torch.float32: 1e-4}, 0.1  # relative, of experts; measured 1.7e-6 in float32
WITHOUT_DROPOUT = ("varlen", "flex")
EXPECTED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError, ImportError)


class Attending(Protocol):
    """What is asked of a backbone here (:class:`trainer.models.backbone.causal_lm.Backbone`)."""

    attention: str
    vocabulary: int
    training: bool

    @property
    def base(self) -> Any: ...
    @property
    def takes_kernels(self) -> bool: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def eval(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def hidden(self, embeds_BLH: Tensor, positions_BL: Tensor, mask_B1LL: Tensor | None = None) -> Tensor: ...
    def packed(self, embeds_TH: Tensor, packing: Packing, cache: PrefixCache | None = None) -> Tensor: ...
    def prefix(self, embeds_PH: Tensor) -> PrefixCache: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


def choose_attention(backbone: Attending, asked: str, usable: str | None, name: str) -> None:
    """Set `backbone.attention` to what was asked for, or for `auto` to the first backend that gives the model's own values.

    Args:
        asked: `model.backbone.attention`.
        usable: what :func:`trainer.models.backbone.loading.resolve_attention` made of it.
        name: of the backbone, for messages.

    Raises:
        BackboneError: the family's logits or masks are not reproduced here, or what was asked for gives other values.
    """
    base = backbone.base
    own, kind = str(base.config._attn_implementation), base.config.model_type
    if own == "sdpa" and base._supports_attention_backend:
        install(base)
    backbone.attention = own
    faults: list[str] = []
    backends = [asked] if asked != "auto" else [*([usable] if usable else []), "blocks", own]
    if not backbone.takes_kernels:
        if own == "sdpa" and next(base.parameters()).dtype in HALF:
            log.warning("%s: models of type %r attend in half precision in scoring as well", name, kind)
        faults = [
            f"{backend}: layers of type {kind!r} take no other attention than {own}"
            for backend in backends
            if backend != own
        ]
        backends = [backend for backend in backends if backend == own]
    dropped = getattr(base.config, "attention_dropout", 0.0)
    if dropped:
        faults += [
            f"{backend} has no dropout, and the model drops {dropped:g}"
            for backend in backends
            if backend in WITHOUT_DROPOUT
        ]
        backends = [backend for backend in backends if backend not in WITHOUT_DROPOUT]
    was_training = backbone.training
    backbone.eval()
    try:
        probe = _Probe(backbone, name)
        probe.check_masks()
        for backend in backends:
            backbone.attention = backend
            fault = probe.fault_of_packed()
            if fault is None:
                left = f", without {'; '.join(faults)}" if faults else ""
                log.info("attention: %s (%s%s)", backend, "auto" if asked == "auto" else "as asked", left)
                return
            faults.append(f"{backend}: {fault}")
    finally:
        backbone.train(was_training)
    advice = "" if own in (asked, *backends) else f". Use model.backbone.attention=auto, or {own}"
    raise BackboneError(f"{name}: packed rows cannot be attended to: {'; '.join(faults)}{advice}")


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block a model that attends through sdpa does so by the family's own formula ("eager"): what sdpa left out, a soft
    cap of the scores for one, would be left out on both sides of the comparison."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, name in before:
            config._attn_implementation = "eager" if name in ("sdpa", NAME) else name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


class _Probe:
    """Six tokens, as two rows that share their first two, through the model's own forward and through this backbone's."""

    def __init__(self, backbone: Attending, name: str) -> None:
        self.backbone, self.name = backbone, name
        first, rows = next(backbone.parameters()), backbone.vocabulary
        self.limit = 1e-3 if first.dtype == torch.float32 else 0.1
        self.ids_T = torch.tensor([rows // divisor for divisor in (7, 5, 3, 2, 4, 6)], device=first.device)
        self.partitioned = any(is_partitioned(p) for p in backbone.parameters())
        self.packing = Packing(PREFIX, torch.tensor(LENGTHS, device=first.device), sum(LENGTHS), max(LENGTHS))

    @torch.no_grad()
    def check_masks(self) -> None:
        """The model's own logits, by its plain attention, against the backbone's, the two rows as branches of one.

        Raises:
            BackboneError: they differ, or the model cannot be run.
        """
        backbone, ids = self.backbone, self.ids_T
        kind = backbone.base.config.model_type
        row = PackedRow(self.packing)
        try:
            branches = torch.stack([ids[[0, 1, 2, 2, 2]], ids[[0, 1, 3, 4, 5]]])
            with _plain_attention(backbone.base):
                own = backbone.base(input_ids=branches, use_cache=False).logits.float()
            self.want_TV = torch.cat([own[0, :3], own[1, 2:]])
            hidden = backbone.hidden(backbone.embed(ids[None]), row.positions_R[None], row.mask_RK[None, None])
            error_size = self._error(backbone.logits(hidden)[0])
        except EXPECTED as error:
            raise BackboneError(f"{self.name}: models of type {kind!r} are not supported: {error}") from error
        if not error_size < self.limit:
            raise BackboneError(
                f"{self.name}: models of type {kind!r} are not supported: logits differ from the model's own by {error_size:.2g} "
                "(relative). Its head or its layers do something that is not reproduced here"
            )

    @torch.no_grad()
    def fault_of_packed(self) -> str | None:
        """What is wrong with the backbone's packed rows, on its device: other values than the model's own, samples that
        see each other, other gradients (of kernels that take no mask), a cached prefix that counts for something else."""
        backbone = self.backbone
        try:
            hidden_TH = backbone.packed(backbone.embed(self.ids_T), self.packing)
            error_size = self._error(backbone.logits(hidden_TH))
            if not error_size < self.limit:
                return f"its values differ from the model's own by {error_size:.2g} (relative)"
            other_T = self.ids_T.clone()
            other_T[PREFIX] = self.ids_T[-1]  # the first sample
            moved_TH = backbone.packed(backbone.embed(other_T), self.packing)
            if self._differ(moved_TH[PREFIX + 1 :], hidden_TH[PREFIX + 1 :]):
                return "samples see each other"
            if not self.partitioned and backbone.attention in CAUSAL_ONLY:
                error_size = self._gradient_error()
                if not error_size < self.limit:
                    return f"its gradients differ from those under a mask by {error_size:.2g} (relative)"
            cache = backbone.prefix(backbone.embed(self.ids_T[:PREFIX]))
            behind_TH = backbone.packed(backbone.embed(self.ids_T[PREFIX:]), self.packing, cache)
            error_size = self._error(backbone.logits(torch.cat([hidden_TH[:PREFIX], behind_TH])))
            if not error_size < self.limit:
                return f"values behind a cached prefix differ from the model's own by {error_size:.2g} (relative)"
        except EXPECTED as error:
            return str(error).strip().partition("\n")[0]
        return None

    def _gradient_error(self) -> float:
        """Of the gradients of the row's embeddings, against those of the attention that takes a mask."""
        backbone, kernel = self.backbone, self.backbone.attention

        def gradients() -> Tensor:
            with torch.enable_grad():
                embeds_TH = backbone.embed(self.ids_T).detach().requires_grad_()
                hidden_TH = backbone.packed(embeds_TH, self.packing)
                weight_TH = torch.linspace(-1, 1, hidden_TH.numel(), device=hidden_TH.device).view_as(hidden_TH)
                (got_TH,) = torch.autograd.grad((hidden_TH.float() * weight_TH).sum(), embeds_TH)
            return got_TH.float()

        got_TH = gradients()
        try:
            backbone.attention = MASKED[0]
            want_TH = gradients()
        finally:
            backbone.attention = kernel
        return float((got_TH - want_TH).norm() / want_TH.norm().clamp_min(1e-6))

    def _differ(self, moved: Tensor, hidden: Tensor) -> bool:
        """Whether a sample's values hang on another sample: in a dense model not by a bit, since all shapes are the same. Experts
        compute with as many tokens at once as the router sends them, and sums of other shapes are rounded otherwise."""
        if not has_experts(self.backbone.base.config):
            return not torch.equal(moved, hidden)
        change = (moved.float() - hidden.float()).norm() / hidden.float().norm().clamp_min(1e-6)
        return not float(change) < ROUNDING.get(hidden.dtype, ROUNDING_HALF)

    def _error(self, got_TV: Tensor) -> float:
        want_TV = self.want_TV
        return float((got_TV.float() - want_TV).norm() / want_TV.norm().clamp_min(1e-6))
