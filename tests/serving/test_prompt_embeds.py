"""A prompt as input embeddings gives plain transformers the scores of `eval.score=full`, with the adapter beside the base or merged into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.serving.conftest import TASKS
from trainer import Predictor
from trainer.data.dataset import open_dataset
from trainer.models.layouts import PaddedLayout
from trainer.serving.prediction import Prepared, PromptEmbeds, SampleError


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(run, overrides=["eval.score=full"])


@pytest.fixture(scope="module", params=["adapter", "merged"])
def plain(request: pytest.FixtureRequest, run: Path, predictor: Predictor) -> PreTrainedModel:
    """The backbone as transformers alone opens it, with the trained adapter."""
    ours = predictor.opened.parts.model.backbone.model
    config = ours.peft_config["default"]
    assert isinstance(config, LoraConfig)
    base = AutoModelForCausalLM.from_pretrained(run / "backbone", dtype=torch.float32)
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(ours))
    return model.merge_and_unload() if request.param == "merged" else model.eval()


@torch.no_grad()
def score(model: PreTrainedModel, prompt: PromptEmbeds, answer: list[int]) -> float:
    """Σ log p of the answer's tokens behind the prompt."""
    ids_A = torch.tensor(answer)
    behind_AH = model.get_input_embeddings()(ids_A[:-1])
    logits_LV = model(inputs_embeds=torch.cat([prompt.embeds_LH, behind_AH])[None]).logits[0]
    logprob_AV = logits_LV[len(prompt.ids_L) - 1 :].double().log_softmax(-1)
    return float(logprob_AV.gather(1, ids_A[:, None]).sum())


@pytest.mark.parametrize("task", TASKS)
def test_transformers_give_our_scores(task: str, run: Path, predictor: Predictor, plain: PreTrainedModel) -> None:
    shown = [s for s in open_dataset(run.parent / task)["test"] if s.audio_TF is not None][:2]
    samples = [{"id": s.id, "text": s.text, "audio": s.audio_TF, "video": s.video_TF, "task": task} for s in shown]
    collate, trie = predictor.opened.parts.collators[task], predictor.opened.parts.tries[task]
    with torch.no_grad():
        expected_BC = predictor.opened.forward(collate(shown, answers=False), trie).logprob_BC
    for sample, expected_C in zip(samples, expected_BC.tolist(), strict=True):
        prompt = predictor.prompt_embeds(sample)
        assert list(prompt.answers) == list(predictor.tasks[task].answers())
        found = [score(plain, prompt, ids) for ids in prompt.answers.values()]
        assert found == pytest.approx(expected_C, abs=1e-4)


def test_what_a_prompt_is_made_of(predictor: Predictor) -> None:
    said = [{"text": f"said {n}", "dialogue": 1, "turn": n, "task": "meld"} for n in range(2)]
    alone = predictor.prompt_embeds(said[1])
    second = predictor.prepare(said)[1]
    assert isinstance(second, Prepared)
    prompt = predictor.prompt_embeds(second)
    assert len(prompt.ids_L) > len(alone.ids_L)  # the utterance before it
    model, collate = predictor.opened.parts.model, predictor.opened.parts.collators["meld"]
    layout = PaddedLayout(collate([second.sample], answers=False))
    assert torch.equal(prompt.ids_L, layout.token_ids[0])
    K = predictor.opened.config.model.fusion.pseudo_tokens
    assert prompt.pseudo_L.nonzero().flatten().tolist() == list(range(len(collate.prefix), len(collate.prefix) + K))
    with torch.no_grad():
        words_LH = model.backbone.embed(prompt.ids_L)
    assert torch.equal(prompt.embeds_LH[~prompt.pseudo_L], words_LH[~prompt.pseudo_L])
    (answer,) = predictor.answer([second], pseudo_tokens=True)
    assert answer.pseudo_KH is not None
    torch.testing.assert_close(prompt.embeds_LH[prompt.pseudo_L], torch.from_numpy(answer.pseudo_KH))
    assert all(ids[-1] == collate.end for ids in prompt.answers.values())


def test_a_prompt_is_of_one_question_and_of_a_good_sample(predictor: Predictor) -> None:
    with pytest.raises(SampleError, match="no text, audio or video"):
        predictor.prompt_embeds({"text": " ", "task": "meld"})
    (prepared,) = predictor.prepare([{"text": "a", "task": "meld"}])
    with pytest.raises(ValueError, match=r"meld are asked of the sample sample-00001: name one of them as task"):
        predictor.prompt_embeds(prepared, task="simsv2")
