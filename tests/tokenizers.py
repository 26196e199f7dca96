"""Tokenizers as families publish them, made here in small: their normalizers, pre-tokenizers, models and decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CTRLTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    *["Emotion: joy", "Emotion: anger neutral surprise fear sadness disgust", "Ross: I know that.\n"] * 20,
    *[f"Sentiment: {v / 10:.1f}" for v in range(-30, 31)] * 5,
    *["情绪：高兴 愤怒 平静 厌恶 恐惧 悲伤 惊奇 情感：-0.3 0.1"] * 20,
    "Recognise the emotion of the speaker in this utterance from its words, voice and face. <Multimodal> </> Answer with one of: "
    * 5,
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . , ! ? ' - : < / >",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _trained(
    tokenizer: Tokenizer, special: list[str], unk: str | None = None, byte_level: bool = False
) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    kind = type(tokenizer.model).__name__
    trainer = {
        "BPE": lambda: trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        "Unigram": lambda: trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token=unk, show_progress=False),
        "WordPiece": lambda: trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    }[kind]()  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], unk_token=unk)


def _by_words(tokenizer: Tokenizer, special: list[str]) -> PreTrainedTokenizerFast:
    """Trained on words, as SentencePiece trains; what is then used cuts no words apart."""
    used = tokenizer.pre_tokenizer
    words = [
        pre_tokenizers.Split(Regex(r"[:：<>/.\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"[ ▁]"), "merged_with_next"),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words if used is None else [*words, used])
    _trained(tokenizer, special, "<unk>")
    tokenizer.pre_tokenizer = used
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], unk_token="<unk>")


def _sentencepiece(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _by_words(tokenizer, ["</s>", "<s>", "<unk>", *BYTES])


def _byte_fallback() -> Tokenizer:
    return Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: the mark is prepended by the normalizer."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(tokenizer)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Later forms of the same: the mark is prepended by the pre-tokenizer."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return _sentencepiece(tokenizer)


def gemma() -> PreTrainedTokenizerFast:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _by_words(tokenizer, ["<eos>", "<unk>", *BYTES])


def t5() -> PreTrainedTokenizerFast:
    """T5, XGLM: a unigram model; white space is one space, and none at the end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False, right=True)]
    )  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _trained(tokenizer, ["</s>", "<unk>"], "<unk>")


def byte_level(prefix: bool = False, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """GPT-2 and OPT; with a prefix RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, ["</s>"], byte_level=True)


def llama3(digits: int = 3) -> PreTrainedTokenizerFast:
    """Llama 3, Tekken; with single digits Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3 % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, ["<|end|>"], byte_level=True)


def stripping() -> PreTrainedTokenizerFast:
    return byte_level(normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()]))


def bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, ["[SEP]", "[UNK]"], "[UNK]")


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama2": llama2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "t5": t5,
    "roberta": lambda: byte_level(prefix=True),
    "stripping": stripping,
    "gpt2": byte_level,
    "llama3": llama3,
    "qwen": lambda: llama3(1),
    "gemma": gemma,
    "bert": bert,
}
MARKED = ("llama2", "metaspace first", "metaspace always", "t5", "roberta", "stripping")
"""Those whose tokens at the beginning of a text are others than inside of one."""


def in_python(folder: Path) -> PreTrainedTokenizerBase:
    """CTRL's, which is written in Python and has no offsets."""
    words = [w for w in " ".join(CORPUS).split() if w.isascii()]
    symbols = sorted({c + end for w in words for c in w for end in ("", "@@")})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *symbols])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="</s>")
