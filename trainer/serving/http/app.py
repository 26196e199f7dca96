"""The application: its paths, what guards them, and how faults become answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from trainer import __version__
from trainer.serving.http import metrics as figures
from trainer.serving.http.body import ClientGoneError
from trainer.serving.http.faults import RefusedError, error_body
from trainer.serving.http.openapi import ERRORS, PREDICT, Predictions, Tasks
from trainer.serving.http.security import HEADERS, Gate
from trainer.serving.http.service import Service

log = logging.getLogger(__name__)

PATHS = ("/", "/page.css", "/page.js", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/tasks", "/v1/predict")
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(service: Service, gate: Gate) -> Guard:
    """The application that uvicorn runs."""

    @contextlib.asynccontextmanager
    async def nothing(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(
        title="egmf serve",
        version=__version__,
        summary="Answers of a trained EGMF model to samples of text, audio and video.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=nothing,
    )
    _add_pages(app)
    _add_state(app, service)
    _add_model(app, service)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        service.metrics.refused.labels(error.code).inc()
        return _json(error.body(), error.status, error.headers)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: "there is no such path", 405: "the path takes another method"}
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
        service.metrics.refused.labels(code).inc()
        body = error_body(code, message.get(error.status_code, "the request is refused"))
        return _json(body, error.status_code, dict(error.headers or {}))

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, unknown)
    return Guard(app, service, gate)


def _add_pages(app: FastAPI) -> None:
    folder = resources.files("trainer.serving.http") / "page"
    for path, (name, kind) in _PAGE.items():
        content = (folder / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8")

        app.add_route(path, _of_request(page), methods=["GET", "HEAD"], include_in_schema=False)


def _of_request(make: Callable[[], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await make()

    return endpoint


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Whether the process lives", tags=["state"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether requests are answered", tags=["state"], responses={503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        service.ready()
        return {"status": "ready"}

    @app.get("/metrics", summary="Figures for Prometheus", tags=["state"], response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": figures.CONTENT_TYPE})


def _add_model(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/tasks",
        summary="What the model answers",
        tags=["model"],
        response_model=Tasks,
        responses={503: ERRORS[503]},
    )
    async def tasks() -> Response:
        return _json(service.ready().tasks)

    @app.post(
        "/v1/predict",
        summary="Answers to samples",
        tags=["model"],
        response_model=Predictions,
        responses=dict(ERRORS),
        openapi_extra=PREDICT,
    )
    async def predict(request: Request) -> Response:
        request.state.samples = 0
        answer = await service.predict(request.headers, request.receive)
        request.state.samples = len(answer["predictions"])
        return _json(answer)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, in which a number that is none is null."""
    content = to_json(value, inf_nan_mode="null")
    return Response(content, status, headers, media_type=JSONResponse.media_type)


class Guard:
    """Around the application: who may ask, headers of every response, a line of the log and figures for each request."""

    def __init__(self, app: FastAPI, service: Service, gate: Gate) -> None:
        self.app, self._service, self._gate = app, service, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self._gate.check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, send_with_headers)
        except RefusedError as error:
            self._service.metrics.refused.labels(error.code).inc()
            await _json(error.body(), error.status, error.headers)(scope, receive, send_with_headers)
        except ClientGoneError:
            status = 499
        except Exception:
            log.exception("a request failed")
            if not status:
                body = error_body("internal", "the server made a mistake; its log has more")
                await _json(body, 500)(scope, receive, send_with_headers)
        finally:
            self._tell(scope, status, time.monotonic() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Nothing that a client wrote gets into the log but the number of its samples."""
        path = scope["path"] if scope["path"] in PATHS else "other"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE") else "other"
        self._service.metrics.requests.labels(path, str(status)).inc()
        self._service.metrics.seconds.labels(path).observe(seconds)
        samples = scope.get("state", {}).get("samples")
        of = f" {samples} predictions" if samples else ""
        seen = path.startswith("/v1/") or (status >= 400 and path != "/readyz")
        level = logging.INFO if seen else logging.DEBUG
        log.log(level, "%s %s %d %.0f ms%s", method, path, status, 1000 * seconds, of)
