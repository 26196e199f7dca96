"""EGMF against independent references: each answer as a row of its own through the language model's own forward."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models.tiny_models import (
    FAMILIES,
    brute_force,
    load,
    make_batch,
    make_fusion,
    make_model,
    make_trie,
    rows_of,
    save_family,
)
from trainer.answer_tree import AnswerTree
from trainer.batch import Features
from trainer.checkpoint.weights import trainable_tensors
from trainer.config import AdapterConfig
from trainer.models.backbone import packed
from trainer.models.backbone.checkpointing import is_checkpointing
from trainer.models.egmf import EGMF, LossOutput, ScoreOutput
from trainer.models.generation import generate
from trainer.models.layouts import PaddedLayout

ANSWERS = [[5], [5, 6], [7, 8, 9], [7, 8, 10], [11]]  # one begins another, two share two tokens
FLAT = [[5], [7], [11]]  # told apart by their first token
SCORES = ("full", "constrained")
LENGTHS = [9, 6, 14, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


def train_batch(pad=0):
    return make_batch(LENGTHS, [[*answer, 0] for answer in ANSWERS[:4]], pad=pad)


def scores(model, batch, answers=ANSWERS, score="full"):
    model.eval()
    with torch.no_grad():
        out = model(batch, make_trie(answers, score=score))
    assert isinstance(out, ScoreOutput)
    return out.logprob_BC


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_brute_force(folders, family, quantization):
    model = make_model(folders(family), quantization=quantization)
    batch = make_batch(LENGTHS, pad=3)
    for score in SCORES:
        for answers in (ANSWERS, FLAT):
            got = scores(model, batch, answers, score)
            with torch.no_grad():
                want = brute_force(model, batch, answers, score)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            assert want.std() > 0.5  # the answers differ: agreement means something
            assert score == "full" or got.exp().sum(1).tolist() == pytest.approx([1.0] * len(batch), abs=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", ["cohere", "gemma2", "phi"])
def test_heads_that_scale_cap_or_shift_are_read_row_by_row(tmp_path, family, score):
    sizes = {"cohere": {"logit_scale": 0.25}, "gemma2": {"final_logit_softcapping": 3.0}, "phi": {}}[family]
    model = make_model(save_family(family, tmp_path / "m", **sizes), fusion=False).eval()
    batch = make_batch([9, 6], pseudo=0)
    with torch.no_grad():
        want = brute_force(model, batch, ANSWERS, score)
        torch.testing.assert_close(scores(model, batch, ANSWERS, score), want, atol=1e-5, rtol=0)
    assert model.backbone.reads_rows


def test_a_head_of_another_kind_is_read_whole(folders, monkeypatch):
    """A head with anything around it is called as it is; here one that doubles what it says."""

    class Loud(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = make_model(folders("qwen3"))
    monkeypatch.setattr(model.backbone.base.get_output_embeddings(), "__class__", Loud)
    assert not model.backbone.reads_rows
    batch = make_batch(LENGTHS)
    with torch.no_grad():
        want = brute_force(model.eval(), batch, ANSWERS, "constrained")
    monkeypatch.setattr("trainer.models.trie_scores.MAX_LOGITS", 320 * 2)  # in several parts
    torch.testing.assert_close(scores(model, batch, ANSWERS, "constrained"), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_hang_on_neighbours_or_padding(folders, attention, dtype, score):
    model = make_model(folders("qwen3"), dtype, attention=attention)
    batch = make_batch(LENGTHS).to("cpu", dtype)
    answers = FLAT if score == "constrained" and attention == "sdpa" else ANSWERS
    alone = torch.cat([scores(model, rows_of(batch, [row]), answers, score) for row in range(len(batch))])
    padded = make_batch(LENGTHS, pad=9).to("cpu", dtype)
    # scores reach -40, where a float32 logit has a unit in the last place of 3.8e-6: matrix products of other sizes round
    # otherwise
    limits = {"atol": 1e-5, "rtol": 2e-7} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 0.0}
    torch.testing.assert_close(scores(model, batch, answers, score), alone, **limits)
    torch.testing.assert_close(scores(model, padded, answers, score), alone, **limits)


def test_bfloat16_scores_equal_brute_force_through_the_same_kernel(folders, monkeypatch):
    model = make_model(folders("qwen3"), torch.bfloat16)
    batch = make_batch(LENGTHS, pad=2).to("cpu", torch.bfloat16)
    got = scores(model, batch)
    own = packed.sdpa_attention_forward

    def in_float32(module, query, key, value, *arguments, **options):
        out, weights = own(module, query.float(), key.float(), value.float(), *arguments, **options)
        return out.to(query.dtype), weights

    monkeypatch.setattr(packed, "sdpa_attention_forward", in_float32)
    with torch.no_grad():
        want = brute_force(model, batch, ANSWERS)
    assert (got - want).abs().max() < 2e-2


def test_scoring_in_chunks_of_places_changes_nothing(folders, monkeypatch):
    model = make_model(folders("llama"))
    batch = make_batch(LENGTHS)
    want = scores(model, batch)
    monkeypatch.setattr("trainer.models.trie_scores.MAX_LOGITS", 320 * 2)
    torch.testing.assert_close(scores(model, batch), want, atol=5e-6, rtol=0)


def test_the_loss_is_minus_the_score_of_the_answer(folders):
    model = make_model(folders("qwen2"))
    table = brute_force(model.eval(), train_batch(), ANSWERS[:4])
    out = model.train()(train_batch(pad=4))
    assert isinstance(out, LossOutput)
    assert out.loss_B.dtype == torch.float32
    torch.testing.assert_close(out.loss_B, -table.diag().detach(), atol=1e-5, rtol=0)
    assert out.unused_param_zero == 0
    assert out.auxiliary_B.tolist() == [0.0] * 4


def test_gradients_equal_a_plain_forward_over_all_positions(folders):
    model = make_model(folders("qwen3"), quantization="nf4").train()
    batch = train_batch(pad=2)
    out = model(batch)
    (out.loss_B.sum() + out.unused_param_zero).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in got.values())
    model.zero_grad()

    embeds, _ = model.embed(PaddedLayout(batch))
    logits = model.backbone.model(inputs_embeds=embeds, use_cache=False).logits
    labels = torch.full(batch.input_ids_BL.shape, -100)
    for row, answer in enumerate(ANSWERS[:4]):
        start = int(batch.context_length_B[row]) - 1
        labels[row, start : start + len(answer) + 1] = torch.tensor([*answer, 0])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)
    assert got["fusion.pseudo.linear.weight"].abs().max() > 0


def test_what_stands_at_the_places_of_pseudo_tokens_is_overwritten(folders):
    model = make_model(folders("qwen3"))
    batch = make_batch(LENGTHS)
    want = scores(model, batch)
    batch.input_ids_BL[:, 2:5] = 17
    assert torch.equal(scores(model, batch), want)
    batch.audio = Features(batch.audio.values_BTF + 1, batch.audio.mask_BT, batch.audio.time_BT)
    assert not torch.allclose(scores(model, batch), want)


def test_padding_tokens_and_padded_answers_change_nothing(folders):
    model = make_model(folders("qwen3")).train()
    batch = train_batch(pad=5)
    want = model(batch).loss_B
    used = (batch.context_length_B + batch.answer_mask_BA.sum(1) - 1)[:, None]
    padding = torch.arange(batch.input_ids_BL.shape[1]) >= used
    batch.input_ids_BL = torch.where(padding, 99, batch.input_ids_BL)
    batch.answer_ids_BA = torch.where(batch.answer_mask_BA, batch.answer_ids_BA, 98)
    assert torch.equal(model(batch).loss_B, want)


def test_no_tensor_over_all_positions_and_the_vocabulary(folders):
    model = make_model(folders("qwen3")).train()
    shapes = []
    model.backbone.base.get_output_embeddings().register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    model(train_batch(pad=30))
    scores(model, make_batch(LENGTHS, pad=30))
    assert shapes == [(4, 4, 320), (4 * 8, 320)]  # answer tokens; the cue and seven nodes of each


def test_every_batch_makes_the_same_module_calls(folders):
    """ZeRO-3 gathers parameters inside module calls: ranks must make the same ones, whatever their batches hold."""
    model = make_model(folders("qwen3"))
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, name=name: calls.append(name))

    def trace(run):
        calls.clear()
        run()
        return list(calls)

    full, other = train_batch(), make_batch([5], [[4, 0]], seed=3)
    other.audio.mask_BT[:] = False
    other.video.mask_BT[:] = False
    model.train()
    assert trace(lambda: model(full)) == trace(lambda: model(other))
    assert trace(lambda: scores(model, make_batch(LENGTHS))) == trace(lambda: scores(model, make_batch([5], seed=3)))


def test_text_enters_fusion_without_a_gradient_even_when_all_is_tuned(folders):
    model = make_model(folders("qwen3"), adapter=AdapterConfig(kind="full")).train()
    batch = train_batch()
    batch.text_ids_BS = torch.full_like(batch.text_ids_BS, 319)  # nowhere else in the batch
    batch.input_ids_BL = batch.input_ids_BL.clamp(max=318)
    model(batch).loss_B.sum().backward()
    grad = model.backbone.base.get_input_embeddings().weight.grad
    assert grad[319].abs().max() == 0
    assert grad.abs().max() > 0


def test_checkpointing_gives_the_same_losses_and_gradients(folders):
    results = []
    for checkpointing in (False, True):
        model = make_model(folders("llama"), quantization="nf4", gradient_checkpointing=checkpointing).train()
        out = model(train_batch())
        out.loss_B.sum().backward()
        results.append((out.loss_B.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
        assert is_checkpointing(model.backbone.base) == checkpointing
    torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=0)
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_checkpointing_keeps_memory_of_few_activations(folders):
    saved = []
    for checkpointing in (False, True):
        model = make_model(folders("llama"), gradient_checkpointing=checkpointing).train()
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model(train_batch(pad=20))
        saved.append(total)
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "glm4"])
def test_generation_equals_growing_the_row_token_by_token(folders, family, attention):
    model = make_model(folders(family), attention=attention).train()
    batch = make_batch([9, 4, 14, 7], pad=2)
    got = generate(model, batch, max_new_tokens=6)
    assert model.training
    model.eval()
    with torch.no_grad():
        embeds, _ = model.embed(PaddedLayout(batch))
        for row in range(len(batch)):
            grown = embeds[row, : batch.context_length_B[row]]
            tokens = []
            for _ in range(6):
                token = int(model.backbone.model(inputs_embeds=grown[None], use_cache=False).logits[0, -1].argmax())
                if token == model.end:
                    break
                tokens.append(token)
                grown = torch.cat([grown, model.backbone.embed(torch.tensor([token]))])
            assert got[row] == model.backbone.tokenizer.decode(tokens)


@pytest.mark.parametrize("answers", [ANSWERS, FLAT])
def test_constrained_generation_takes_the_likeliest_token_that_goes_on_with_an_answer(folders, answers):
    model = make_model(folders("qwen3"))
    rows = [(*answer, model.end) for answer in answers]
    tree = AnswerTree(tuple(map(str, answers)), tuple(rows))
    batch = make_batch([9, 4, 14, 7, 11, 6], pad=2)
    got = generate(model, batch, max(map(len, rows)) + 2, tree)
    model.eval()
    wanted = []
    with torch.no_grad():
        embeds, _ = model.embed(PaddedLayout(batch))
        for row in range(len(batch)):
            grown, tokens = embeds[row, : batch.context_length_B[row]], ()
            while not tokens or tokens[-1] != model.end:
                logits = model.backbone.model(inputs_embeds=grown[None], use_cache=False).logits[0, -1]
                following = {other[len(tokens)] for other in rows if other[: len(tokens)] == tokens}
                tokens += (max(following, key=lambda token: float(logits[token])),)
                grown = torch.cat([grown, model.backbone.embed(torch.tensor(tokens[-1:]))])
            assert tokens in rows
            wanted.append(model.backbone.tokenizer.decode(tokens[:-1]))
    assert got == wanted
    assert len(set(got)) > 1


def test_generation_stops_at_the_end_token(folders):
    model = make_model(folders("qwen3"), fusion=False, adapter=AdapterConfig(kind="full"))
    batch = make_batch([5, 8], pseudo=0)
    free = generate(model, batch, 8)
    assert all(free)
    with torch.no_grad():
        model.backbone.base.lm_head.weight[0] += 100 * model.backbone.base.lm_head.weight.abs().max()
        model.backbone.base.lm_head.weight[0] *= 0  # logit 0: above all where the others are negative
    model.backbone.base.lm_head.register_forward_hook(
        lambda m, i, out: torch.where(torch.arange(320) == 0, math.inf, out)
    )
    assert generate(model, batch, 8) == ["", ""]


def test_without_fusion_the_model_reads_text_alone(folders):
    model = make_model(folders("qwen2"), fusion=False)
    batch = make_batch(LENGTHS, [[*answer, 0] for answer in ANSWERS[:4]], pseudo=0)
    out = model.train()(batch)
    assert out.gate_expert_BKE is None
    out.loss_B.sum().backward()
    with pytest.raises(ValueError, match="3 places for pseudo tokens, the model makes none"):
        model(train_batch())
    with pytest.raises(ValueError, match="2 places for pseudo tokens, the model makes 3"):
        make_model(folders("qwen2"))(make_batch(LENGTHS, pseudo=2))


def test_a_batch_without_answers_has_no_loss(folders):
    with pytest.raises(ValueError, match="no loss"):
        make_model(folders("qwen2"))(make_batch(LENGTHS))


def test_balance_is_weighted_and_usage_is_collected_in_training_only(folders):
    backbone = load(folders("qwen2"))
    fusion = make_fusion(backbone, gate={"balance_weight": 0.5})
    model = EGMF(backbone, fusion).train()
    torch.nn.init.normal_(fusion.gate.expert.weight)
    batch = train_batch()
    batch.weight_B = torch.tensor([1.0, 2.0, 0.0, 1.0])
    fusion.gate.usage_E.copy_(torch.tensor([0.5, 0.3, 0.2]))
    out = model(batch)
    want = 0.5 * 3 * (out.gate_expert_BKE.mean(1) * torch.tensor([0.5, 0.3, 0.2])).sum(1)
    torch.testing.assert_close(out.auxiliary_B, want)
    share = (batch.weight_B[:, None] * out.gate_expert_BKE.mean(1)).sum(0) / 4
    model.eval()(batch)
    fusion.gate.update_usage()
    torch.testing.assert_close(fusion.gate.usage_E, 0.9 * torch.tensor([0.5, 0.3, 0.2]) + 0.1 * share.detach())


def test_frozen_backbone_trains_the_fusion_network_only(folders):
    model = make_model(folders("qwen3"), adapter=AdapterConfig(kind="frozen")).train()
    assert all(name.startswith("fusion.") for name, p in model.named_parameters() if p.requires_grad)
    model(train_batch()).loss_B.sum().backward()
    assert model.fusion.pseudo.linear.weight.grad.abs().max() > 0
    assert all(name.startswith("fusion.") for name in trainable_tensors(model))


def test_casting_the_model_leaves_its_buffers_in_float32(folders):
    model = make_model(folders("llama"))
    want = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    assert any("inv_freq" in name for name in want)
    model.bfloat16()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            assert torch.equal(buffer, want[name]), name
    assert model.backbone.base.get_input_embeddings().weight.dtype == torch.bfloat16
