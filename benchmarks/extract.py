"""How long does extraction take? Every stage, and encoders of the usual sizes, on one clip of speech and a moving face.

    python -m benchmarks.extract [--seconds 10] [--stages basic,encoders] [--predict RUN] [--out benchmarks/results/extract.json]

The clip is 640 x 480 pixels at 25 pictures a second (H.264, AAC). Times are of the wall clock, each stage in a process of its own with one thread,
the second of two passes; "times real time" is the clip's length over that, and memory the largest resident size. Encoders have
random weights of the published models' shapes, which cost what trained ones do. `--predict` times `egmf predict RUN` on the one clip, from
the start of the command to its end, with two processes for clips and all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from benchmarks.machine import describe, today
from trainer.features.types import Clip

ROOT = Path(__file__).resolve().parent.parent
BASIC = (
    "decode sound",
    "decode pictures, 10 a second",
    "log-mel, pitch, energy",
    "speech activity",
    "faces, landmarks",
    "recipe basic",
)
ENCODERS = (
    "wavlm-base, 12 layers",
    "whisper-small, encoder",
    "clip ViT-B/16 of faces, 5 a second",
    "videomae-base of faces, 2 windows a second",
)
WORDS = "the quick brown fox jumps over the lazy dog and nobody in the village has seen it since"


class Row(TypedDict):
    """One stage."""

    stage: str
    seconds: float
    times_real_time: float
    peak_MiB: float


def make_clip(path: Path, seconds: float) -> Path:
    """A portrait that moves a little, and a voice that reads one sentence again and again."""
    import av
    from PIL import Image
    from skimage.data import astronaut

    spoken = subprocess.run(["espeak-ng", "--stdout", WORDS], check=True, capture_output=True).stdout
    sound_n = np.frombuffer(spoken[44:], np.int16)
    sound_n = np.resize(sound_n, round(seconds * 22050))
    photo = Image.fromarray(astronaut())
    with av.open(str(path), "w") as out:
        video: Any = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 640, 480, "yuv420p"
        audio: Any = out.add_stream("aac", rate=22050, layout="mono")
        for k in range(round(seconds * 25)):
            shift = round(20 * np.sin(2 * np.pi * k / 40))
            frame = av.VideoFrame.from_image(photo.resize((640, 640)).crop((shift, 0, 640 + shift, 480)))
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound_n[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 22050, 0, Fraction(1, 22050)
        out.mux(audio.encode(frame))
        out.mux(audio.encode())
    return path


def save_encoder(stage: str, folder: Path) -> Path:
    """A model of the stage's shape with random weights, and its processor."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    if stage.startswith("wavlm"):
        t.WavLMModel(t.WavLMConfig()).save_pretrained(folder)
        t.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    elif stage.startswith("whisper"):
        sizes = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
        other = {"decoder_layers": 1, "decoder_attention_heads": 12, "decoder_ffn_dim": 768}
        t.WhisperModel(t.WhisperConfig(**sizes, **other)).save_pretrained(folder)
        t.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    elif stage.startswith("clip"):
        t.CLIPVisionModel(t.CLIPVisionConfig(patch_size=16)).save_pretrained(folder)
        t.CLIPImageProcessor().save_pretrained(folder)
    else:
        t.VideoMAEModel(t.VideoMAEConfig()).save_pretrained(folder)
        t.VideoMAEImageProcessor().save_pretrained(folder)
    return folder


def call_of(stage: str, clip: Clip, work: Path) -> Callable[[], object]:
    """What is timed: models are loaded before."""
    from trainer.features.audio.features import audio_features
    from trainer.features.audio.speech import SpeechActivity
    from trainer.features.extractor import Extractor
    from trainer.features.media.clip import read_pictures, read_sound
    from trainer.features.recipe import AudioEncoder, Landmarks, LogMel, VideoEncoder, read_recipe
    from trainer.features.video.features import video_features

    def sound(rate: int) -> Any:
        return read_sound(clip, rate, 3600.0)[0]

    if stage == "decode sound":
        return lambda: sound(16000)
    if stage.startswith("decode pictures"):
        return lambda: sum(1 for _ in read_pictures(clip, 10.0, 3600.0))
    if stage == "recipe basic":
        extractor = Extractor(read_recipe("basic"))
        return lambda: extractor.extract(clip, "a text")
    if stage == "speech activity":
        heard, speech = sound(16000), SpeechActivity()
        return lambda: speech.windows(heard)
    if stage.startswith(("log-mel", "wavlm", "whisper")):
        section = (
            LogMel(kind="log_mel")
            if stage.startswith("log")
            else AudioEncoder(kind="encoder", name=str(save_encoder(stage, work)))
        )
        audio = audio_features(section)
        heard = sound(audio.sampling_rate)
        return lambda: audio(heard)
    seen: Landmarks | VideoEncoder = Landmarks(kind="landmarks")
    if not stage.startswith("faces"):
        windows = {"rate": 2.0, "pooling": "mean"} if "videomae" in stage else {}
        seen = VideoEncoder(kind="encoder", name=str(save_encoder(stage, work)), **windows)
    video = video_features(seen)

    def look() -> object:
        with read_pictures(clip, video.picture_rate, 3600.0) as pictures:
            return video(pictures, pictures.count)

    return look


def measure(stage: str, path: Path, seconds: float, work: Path) -> Row:
    """One stage, in this process."""
    import torch

    torch.set_num_threads(1)
    call = call_of(stage, Clip(path), work)
    call()
    began = time.perf_counter()
    call()
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "stage": stage,
        "seconds": round(took, 3),
        "times_real_time": round(seconds / took, 1),
        "peak_MiB": round(peak),
    }


def predict(run: Path, path: Path) -> float:
    """Seconds of the whole command for one clip."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder) / "clips.jsonl", Path(folder) / "answers.jsonl"
        asked.write_text(json.dumps({"id": "a", "clip": str(path), "text": WORDS}) + "\n")
        began = time.perf_counter()
        command = [sys.executable, "-m", "trainer", "predict", str(run), "--input", str(asked), "--out", str(answers)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        took = time.perf_counter() - began
        assert json.loads(answers.read_text())["valid"]
    return took


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        stage, path, seconds, work = sys.argv[2:]
        print(json.dumps(measure(stage, Path(path), float(seconds), Path(work))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--stages", default="basic,encoders")
    parser.add_argument("--predict", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    stages = [s for name, group in (("basic", BASIC), ("encoders", ENCODERS)) if name in args.stages for s in group]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        clip = make_clip(Path(folder) / "clip.mp4", args.seconds)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for number, stage in enumerate(stages):
            work = str(Path(folder) / str(number))
            command = [sys.executable, "-m", "benchmarks.extract", "--stage", stage, str(clip), str(args.seconds), work]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{stage} failed:\n{done.stderr[-3000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        answered = None if args.predict is None else round(predict(args.predict, clip), 2)
    if answered is not None:
        print(f"egmf predict of one clip of {args.seconds:g} s: {answered} s")
    if args.out:
        report = {
            "date": today(),
            "command": "python -m benchmarks.extract",
            "machine": describe("torch", "transformers", "av", "ai-edge-litert"),
            "load_average_at_end": [round(n, 1) for n in os.getloadavg()],
            "clip_seconds": args.seconds,
            "rows": rows,
            "predict_seconds": answered,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
