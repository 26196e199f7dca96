"""What `/openapi.json` says of requests and answers, with examples that every model takes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trainer.serving.http.asking import FIELDS, OPTIONS, RATES, SPAN


class OneFault(BaseModel):
    where: str = Field(description="the place in the request", examples=["samples[3].audio[7]"])
    reason: str


class Error(BaseModel):
    code: str = Field(description="for programs", examples=["bad_samples"])
    message: str
    faults: list[OneFault] = Field(description="everything that is wrong, of very much the first hundred")


class Refusal(BaseModel):
    error: Error


class OnePrediction(BaseModel):
    """The answer to one question about one sample."""

    id: str
    task: str
    prediction: str | float | None = Field(description="a label or a number; null where the answer is not valid")
    valid: bool
    answer: str = Field(description="the text behind the prediction")
    probabilities: dict[str, float | None] | None = Field(None, description="answer -> p; where asked for")
    gate_expert: dict[str, float | None] | None = Field(None, description="expert -> weight; where asked for")
    gate_modality: dict[str, dict[str, float | None]] | None = Field(
        None, description="expert -> modality -> weight; where asked for"
    )


class Note(BaseModel):
    id: str
    notes: list[str] = Field(description="repairs, texts that were cut, and what was not used")


class Predictions(BaseModel):
    predictions: list[OnePrediction] = Field(
        description="in the order of the samples; of several questions about a sample, one after the other"
    )
    notes: list[Note]


class Tasks(BaseModel):
    """What the model answers and reads, and the server's limits."""

    model_config = ConfigDict(extra="allow")
    tasks: dict[str, Any] = Field(description="name -> kind, labels or grid, language, widths, rates, recipe")
    questions: dict[str, list[str]] = Field(description="a name that asks several tasks about one sample -> these")
    default: str | None = Field(description="what a sample is asked that names no task; null: it must name one")
    limits: dict[str, float]


_TEXTS = {
    400: "no JSON, no form or no HTTP",
    401: "the token is missing or wrong",
    403: "a page of another site asks",
    408: "the body comes too slowly",
    413: "the body is too large",
    415: "neither JSON nor a form",
    421: "the Host header names another machine",
    422: "samples that cannot be answered, with every fault",
    429: "the server is busy: ask again after Retry-After seconds",
    503: "the model is being loaded, or the server stopped",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": text} for status, text in _TEXTS.items()
}

_ARRAY = {
    "description": "[frames, features]: nested lists, or bytes of .npz or .npy in base64",
    "oneOf": [
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        {"type": "object", "properties": {"npz": {"type": "string", "format": "byte"}}, "required": ["npz"]},
        {"type": "object", "properties": {"npy": {"type": "string", "format": "byte"}}, "required": ["npy"]},
    ],
}
_WORD = {"oneOf": [{"type": "string"}, {"type": "integer"}]}
_SAMPLE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "id": {**_WORD, "description": "told apart in one request; by default the sample's place from 0"},
        "text": {"type": "string"},
        "task": {"type": "string", "description": "needed where the model has several; see /v1/tasks"},
        "audio": _ARRAY,
        "video": _ARRAY,
        "audio_length": {"type": "integer", "minimum": 0},
        "video_length": {"type": "integer", "minimum": 0},
        "rate": {"type": "object", "additionalProperties": {"type": "number"}, "description": "frames a second"},
        "speaker": _WORD,
        "dialogue": {**_WORD, "description": "earlier utterances of it in the request are the sample's history"},
        "turn": {"type": "integer"},
        "language": {"type": "string"},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["samples"],
    "additionalProperties": False,
    "properties": {
        "samples": {"type": "array", "minItems": 1, "items": _SAMPLE},
        "options": {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: {"type": "boolean", "default": False} for name in OPTIONS},
        },
    },
}
_FORM = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in (*FIELDS, *SPAN, *RATES, *OPTIONS)},
        "clip": {
            "type": "string",
            "format": "binary",
            "description": "a media file; where /v1/tasks says that clips are taken",
        },
        "features": {"type": "string", "format": "binary", "description": ".npz with audio, video or both"},
        "audio": {"type": "string", "format": "binary", "description": ".npy or .npz"},
        "video": {"type": "string", "format": "binary", "description": ".npy or .npz"},
    },
}
EXAMPLES: dict[str, Any] = {
    "a text": {"value": {"samples": [{"text": "I told you so."}]}},
    "probabilities": {
        "value": {"samples": [{"id": "a1", "text": "What a day!"}], "options": {"probabilities": True}},
    },
    "a dialogue": {
        "value": {
            "samples": [
                {"id": "d7-0", "text": "Where were you?", "speaker": "Ann", "dialogue": "d7", "turn": 0},
                {"id": "d7-1", "text": "I missed the bus.", "speaker": "Ben", "dialogue": "d7", "turn": 1},
            ]
        }
    },
}
PREDICT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _REQUEST, "examples": EXAMPLES},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}
