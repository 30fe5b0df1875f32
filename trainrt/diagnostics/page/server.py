"""`trainrt dashboard`: one page about one run, live or finished. It reads the run directory and nothing else."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from trainrt.diagnostics.page.views import Views
from trainrt.errors import DiagnosticsError
from trainrt.run_dir import RunDir

STATIC = Path(__file__).parent / "static"
REFRESH_SECONDS = 0.5
POLICY = "default-src 'self'; frame-ancestors 'none'"
JSON = "application/json"


def serve(run_dir: str | Path, *, host: str, port: int, token: str | None) -> None:
    """Serve until interrupted. Raises DiagnosticsError for a port in use, no run, or an open address without a token."""
    directory = RunDir(run_dir)
    if not directory.path.is_dir():
        raise DiagnosticsError(f"{directory}: no such run directory")
    if not _loopback(host) and not token:
        raise DiagnosticsError(f"--host {host} is open to others; allowed: a loopback address, or --token as well")
    listener = _listen(host, port)
    print(f"dashboard: http://{host}:{listener.getsockname()[1]}/{f'?token={token}' if token else ''}", flush=True)
    config = uvicorn.Config(make_app(directory, token=token), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise DiagnosticsError(
            f"--port {port} on {host}: {error.strerror}; allowed: a free port (0 takes any)"
        ) from error
    return listener


def make_app(directory: RunDir, *, token: str | None) -> FastAPI:
    """The application over one run directory."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    views = Views(directory)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token and not _admitted(request, token):
            return PlainTextResponse("this page asks for its token: ?token=...\n", status_code=401)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        if token and request.query_params.get("token") is not None:
            response.set_cookie("trainrt_token", token, httponly=True, samesite="strict")
        return response

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/stream")
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(_changes(request, views), media_type="text/event-stream")

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(views.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_documents(app, views)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _add_documents(app: FastAPI, views: Views) -> None:
    plain: dict[str, Callable[[], bytes]] = {
        "run": views.run, "diagnosis": views.diagnosis, "heatmap": views.heatmap, "accounting": views.accounting,
        "incidents": views.incidents, "plan": views.plan, "health": views.health,
    }  # fmt: skip
    for name, make in plain.items():
        # A default of a parameter would be taken for a query: the function is bound by a closure.
        app.get(f"/api/{name}")(_answering(make))

    @app.get("/api/metrics")
    def metrics(after: int = 0) -> Response:
        return Response(views.metrics(after), media_type=JSON)

    @app.get("/api/timeline")
    def timeline(step: int | None = None, rank: int | None = None) -> Response:
        return Response(views.timeline(step, rank), media_type=JSON)

    @app.get("/api/perfetto")
    def trace(step: int, rank: int | None = None) -> Response:
        headers = {"Content-Disposition": f'attachment; filename="{views.reader.run_dir.path.name}-step-{step}.json"'}
        return Response(views.perfetto(step, rank), media_type=JSON, headers=headers)


def _answering(make: Callable[[], bytes]) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(make(), media_type=JSON)

    return answer


def _admitted(request: Request, token: str) -> bool:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    offered = request.query_params.get("token") or request.cookies.get("trainrt_token") or bearer
    return hmac.compare_digest(offered.encode(), token.encode())


async def _changes(request: Request, views: Views) -> AsyncIterator[str]:
    """Server-sent events: the status and what is new, whenever it or any file of the run is."""
    seen: Any = None
    while not await request.is_disconnected():
        found = await asyncio.to_thread(views.changes)
        if found != seen:
            seen = found
            yield f"event: change\ndata: {json.dumps(found)}\n\n"
        else:
            yield ": still here\n\n"
        await asyncio.sleep(REFRESH_SECONDS)
