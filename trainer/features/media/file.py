"""One media file by FFmpeg (PyAV): what is in it, which seconds of it are meant, and its frames in time.

Seconds are counted as players count them: from the first time stamp of the file, or from 0 where that is negative. Decoders run on one thread, so the
same bytes give the same frames everywhere. Nothing but the file itself is opened: no playlist, no network, no picture sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trainer.features.types import Clip, ClipError, Note

if TYPE_CHECKING:
    from av.container import InputContainer

Kind = Literal["sound", "picture"]
MODALITY: dict[Kind, Literal["audio", "video"]] = {"sound": "audio", "picture": "video"}

MOST_PIXELS = 1 << 26  # of one picture: more is taken for damage
PREROLL = 1.0  # seconds that are decoded before the start of a clip and not used: decoders remember what came before
FURTHER_BACK = (PREROLL, 10.0, 60.0)  # seconds before the start, tried in turn where a file is sought imprecisely
SLACK = 0.1  # seconds that a clip may be longer than is allowed, and a file shorter than it says: padding of encoders
LATE = 0.5  # seconds that the end of a clip may be behind that of its file: times of annotations are rounded
BEYOND = 4  # successive frames behind the end of a clip after which it is over; a single one is a damaged time stamp

# What FFmpeg would read as a list of other files, as addresses, or as a drawing made of text.
_NOT_MEDIA = [
    "adf",
    "applehttp",
    "bin",
    "concat",
    "concatf",
    "dash",
    "ffmetadata",
    "hls",
    "idf",
    "image2",
    "image2pipe",
    "imf",
    "lavfi",
    "rtp",
    "rtsp",
    "sap",
    "sdp",
    "tty",
    "vobsub",
    "webm_dash_manifest",
    "xbin",
]
# Bare streams: their time stamps are counted from the beginning, so they are decoded from there.
_NOT_SOUGHT = frozenset(
    "ac3 amr amrnb amrwb dts dtshd eac3 h264 hevc loas m4v mjpeg mlp mpegvideo obu truehd vvc".split()  # noqa: SIM905
)
_GUESSED = _NOT_SOUGHT | {"aac", "mp3"}  # files without a duration of their own: FFmpeg guesses it from their size


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: its seconds (nan: unknown without reading it), tracks, and FFmpeg's names of container and codecs."""

    seconds: float
    has_sound: bool
    has_picture: bool
    container: str
    sound_codec: str | None
    picture_codec: str | None


class Window(NamedTuple):
    """The seconds of a file that a clip stands for: `start` to `end`, both inside the file."""

    start: float
    end: float
    ends: dict[int, float]  # where the packets of each stream end
    missing: str  # in words: how much of what was asked for the file does not hold; empty where it holds all

    @property
    def seconds(self) -> float:
        return self.end - self.start


class TimedFrame(NamedTuple):
    """A decoded frame with its seconds."""

    time: float
    end: float
    frame: Any  # av.AudioFrame or av.VideoFrame


def probe(path: Path) -> MediaInfo:
    """What a file holds, from its headers and first packets.

    Raises:
        ClipError: `unreadable` or `empty`.
    """
    with MediaFile(path) as media:
        return media.info


def load_av() -> Any:
    """The package av.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"clips are decoded by PyAV ({error}): pip install 'egmf-trainer[clips]'") from error
    return av


class MediaFile:
    """An open file with at most one sound track and one picture track: the default ones, or the first; cover art is no picture track.

    Raises:
        ClipError: `unreadable` (no file, no media, no track) or `empty` (no bytes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise ClipError("unreadable", f"{path}: is a folder, not a media file")
        if not path.exists():
            raise ClipError("unreadable", f"{path}: there is no such file")
        if path.stat().st_size == 0:
            raise ClipError("empty", f"{path}: the file is empty")
        self._open()
        if not self.tracks:
            self.close()
            raise ClipError("unreadable", f"{path}: has neither sound nor pictures (FFmpeg reads it as {self._name})")

    def _open(self) -> None:
        av = load_av()
        limits = {"threads": "1", "max_pixels": str(MOST_PIXELS)}
        inside = {"protocol_whitelist": "file", "format_whitelist": _formats()}
        try:
            self._container: InputContainer = av.open(
                f"file:{self.path}", "r", options=limits, container_options=inside, metadata_errors="replace"
            )
        except (av.FFmpegError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ClipError("unreadable", f"{self.path}: is no media file that FFmpeg reads ({reason})") from error
        self._fresh = True
        self._name: str = self._container.format.name
        self._origin = max(0.0, (self._container.start_time or 0) / av.time_base)
        self.tracks: dict[Kind, Any] = {}
        streams = self._container.streams
        hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        kinds: tuple[tuple[Kind, Any], ...] = (
            ("sound", streams.audio),
            ("picture", [stream for stream in streams.video if not stream.disposition & hidden]),
        )
        for kind, found in kinds:
            if found:
                self.tracks[kind] = max(found, key=functools.partial(_preference, av.stream.Disposition.default))
                if (decoder := self.tracks[kind].codec_context) is not None:
                    decoder.thread_count = 1
                    decoder.options = {"max_pixels": str(MOST_PIXELS)}

    @property
    def stated(self) -> float | None:
        """Seconds that the container says it has; None where it does not say."""
        length = self._container.duration
        if length is None or length <= 0 or self._name in _GUESSED:
            return None
        seconds = float(length / load_av().time_base)
        if self._name == "avi" and "picture" in self.tracks:
            # FFmpeg makes them fewer where the file is shorter than its header says, which is what is to be told
            seconds = max(seconds, float(self.tracks["picture"].frames * self.tracks["picture"].time_base))
        return seconds

    @property
    def info(self) -> MediaInfo:
        return MediaInfo(
            seconds=math.nan if self.stated is None else self.stated,
            has_sound="sound" in self.tracks,
            has_picture="picture" in self.tracks,
            container=self._name,
            sound_codec=self._codec("sound"),
            picture_codec=self._codec("picture"),
        )

    def _codec(self, kind: Kind) -> str | None:
        track = self.tracks.get(kind)
        decoder = None if track is None else track.codec_context
        return None if decoder is None else str(decoder.name)

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cannot_decode(self, kind: Kind, reason: str) -> Note:
        """The note on a track that cannot be decoded.

        Raises:
            ClipError: `unreadable`: it is the only track.
        """
        if len(self.tracks) == 1:
            raise ClipError("unreadable", f"{self.path}: {reason}")
        return Note("unreadable", MODALITY[kind], reason)

    def window(self, clip: Clip, max_seconds: float) -> Window:
        """Which seconds a clip stands for, from the time stamps of its packets; nothing is decoded.

        Raises:
            ClipError: `empty` or `too long`.
        """
        start, wanted = clip.start or 0.0, math.inf if clip.end is None else clip.end
        if not 0 <= start < wanted:
            raise ClipError("empty", f"{self.path}: start {start:g} and end {wanted:g} leave nothing between them")
        stated = math.inf if self.stated is None else self.stated
        if stated < math.inf:
            self._check_length(min(wanted, stated) - start, max_seconds)
        ends, broken = self._ends(start, min(wanted, stated + 60 if stated < math.inf else wanted), max_seconds)
        reached = max(ends.values(), default=0.0)
        if reached > 2 * stated + 10:  # a damaged time stamp
            reached = stated
        if reached <= start:
            raise ClipError("empty", f"{self.path}: {self._nothing_after(start, max(reached, 0.0), stated)}")
        end = min(wanted, reached)
        self._check_length(end - start, max_seconds)
        missing = self._missing(start, end, min(wanted, stated), broken)
        if not missing and LATE < wanted - end < math.inf:
            missing = f"end {wanted:g} is behind the end of the file, at {end:.2f} s"
        return Window(start, end, ends, missing)

    def _check_length(self, seconds: float, max_seconds: float) -> None:
        if seconds > max_seconds + SLACK:
            raise ClipError(
                "too long",
                f"{self.path}: more than {max_seconds:g} seconds, which is the recipe's max_seconds: "
                "give start and end, or raise it",
            )

    def _nothing_after(self, start: float, reached: float, stated: float) -> str:
        if start > 0:
            ends = min(stated, reached) if reached else stated
            where = f", which ends at {ends:.2f} s" if ends < math.inf else ""
            return f"start {start:g} is behind the end of the file{where}"
        return "holds no sound and no pictures, only headers"

    def _missing(self, start: float, end: float, wanted: float, broken: str | None) -> str:
        """`truncated`, in words."""
        track = self.tracks.get("picture")
        rate = None if track is None else track.average_rate
        tolerance = SLACK + (1 / float(rate) if rate else 0.0)
        if wanted < math.inf and wanted - end > tolerance:
            return f"{end - start:.2f} of {wanted - start:.2f} seconds could be read: the file is damaged or not whole"
        if broken is not None:
            return f"{end - start:.2f} seconds could be read before the file is damaged ({broken})"
        return ""

    def _ends(self, start: float, end: float, max_seconds: float) -> tuple[dict[int, float], str | None]:
        """Where the packets of each track end, of those that begin before `end`; and the fault that stopped reading."""
        ends: dict[int, float] = {}
        last = start + max_seconds + SLACK
        packets = self._packets(next(iter(self.tracks)), start, all_tracks=True)
        try:
            for packet in packets:
                if _is_last(packet) or packet.is_discard:
                    continue
                track, index = packet.stream, packet.stream_index
                time = self._seconds(track, packet.pts if packet.pts is not None else packet.dts)
                time = ends.get(index, 0.0) if time is None else time
                if time >= end + PREROLL:
                    ends[index] = max(ends.get(index, 0.0), end)
                    break
                length = float((packet.duration or 0) * track.time_base)
                if not length and track.type == "video" and track.guessed_rate:
                    length = 1 / float(track.guessed_rate)
                ends[index] = max(ends.get(index, 0.0), time + length)
                if self.stated is None and min(time, end) > last:
                    self._check_length(math.inf, max_seconds)
        except load_av().FFmpegError as error:
            return ends, str(error.strerror)
        return ends, None

    def frames(self, kind: Kind, window: Window) -> Frames:
        """The frames of one track around a window."""
        return Frames(self, kind, window)

    def _packets(self, kind: Kind, start: float, all_tracks: bool = False) -> Iterator[Any]:
        """Packets of one track, or of all, from one that is decoded before `start`."""
        av = load_av()
        for back in FURTHER_BACK:
            if start <= back or self._name in _NOT_SOUGHT:
                break
            if not self._fresh:
                self._reopen()
            track = self.tracks[kind]
            try:
                self._container.seek(math.floor((start - back + self._origin) / track.time_base), stream=track)
                self._fresh = False
                packets = self._demux(kind, all_tracks)
                first = next(packets, None)
            except (av.FFmpegError, OverflowError):
                continue
            time = None if first is None else self._seconds(track, first.dts if first.dts is not None else first.pts)
            if first is not None and time is not None and time <= start:
                return chain([first], packets)
        if not self._fresh:
            self._reopen()
        self._fresh = False
        return self._demux(kind, all_tracks)

    def _demux(self, kind: Kind, all_tracks: bool) -> Iterator[Any]:
        tracks = list(self.tracks.values()) if all_tracks else [self.tracks[kind]]
        try:
            yield from self._container.demux(*tracks)
        except (
            IndexError
        ):  # at the end of a file in which a track appeared on the way: PyAV ends that one too, and does not know it
            return

    def _reopen(self) -> None:
        """From the beginning, as if nothing had been read: what decoders skip there is skipped again."""
        self.close()
        self._open()

    def _seconds(self, track: Any, stamp: int | None) -> float | None:
        return None if stamp is None else float(stamp * track.time_base) - self._origin


class Frames(Iterator[TimedFrame]):
    """Decoded frames of one track that begin before the end of a window, the first of them before its start where there is one.

    Packets that cannot be decoded are counted in `damaged`, all of them in `packets`; pictures come in the order of time.
    """

    def __init__(self, media: MediaFile, kind: Kind, window: Window) -> None:
        self.damaged = self.packets = self.decoded = 0
        self.ended = False
        self._frames = self._decode(media, kind, window)

    def __next__(self) -> TimedFrame:
        try:
            return next(self._frames)
        except StopIteration:
            self.ended = True
            raise

    @property
    def fault(self) -> str:
        """How much could not be decoded, in words; empty where all could."""
        return f"{self.damaged} of {self.packets} packets could not be decoded" if self.damaged else ""

    def _decode(self, media: MediaFile, kind: Kind, window: Window) -> Iterator[TimedFrame]:
        expected, last, beyond = 0.0, -math.inf, 0
        packets = media._packets(kind, window.start)
        track = media.tracks[kind]  # seeking may have opened the file again
        for frame in self._raw(packets, track):
            stamp = frame.pts if frame.pts is not None else frame.dts
            time = media._seconds(track, stamp)
            time = expected if time is None else time
            if kind == "picture" and time < last:
                continue  # a damaged time stamp: pictures come out in the order of time
            beyond = beyond + 1 if time >= window.end else 0
            if beyond == BEYOND:
                return
            if beyond:
                continue
            end = time + _length(frame, track)
            expected, last = end, time
            self.decoded += 1
            yield TimedFrame(time, end, frame)

    def _raw(self, packets: Iterator[Any], track: Any) -> Iterator[Any]:
        """What the decoder gives, damaged packets left out."""
        faults = (load_av().FFmpegError, ValueError)
        whole = False
        while not whole:
            try:
                packet = next(packets, None)
            except faults:
                packet = None
            whole = packet is None or _is_last(packet)
            if packet is not None and not whole:
                if packet.size == 0:  # of a picture that is not there: the one before stays
                    continue
                self.packets += 1
            try:
                frames = track.codec_context.decode(None if whole else packet)
            except faults:
                self.damaged += not whole
                frames = []
            yield from frames


def _is_last(packet: Any) -> bool:
    """Whether it is the empty packet that PyAV adds at the end."""
    return packet.size == 0 and packet.pts is None and packet.dts is None


def _length(frame: Any, track: Any) -> float:
    """Seconds of a frame."""
    if track.type == "audio":
        return float(frame.samples / frame.sample_rate) if frame.sample_rate else 0.0
    if frame.duration:
        return float(frame.duration * track.time_base)
    return 1 / float(track.guessed_rate) if track.guessed_rate else 0.0


def _preference(default: int, stream: Any) -> tuple[bool, bool, int]:
    return stream.codec_context is not None, bool(stream.disposition & default), -stream.index


@functools.cache
def _formats() -> str:
    return ",".join(sorted(set(load_av().formats_available).difference(_NOT_MEDIA)))
