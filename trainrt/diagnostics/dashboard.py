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
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from trainrt.diagnostics.prometheus import exposition
from trainrt.diagnostics.reader import RunReader
from trainrt.diagnostics.summaries import heatmap, timeline
from trainrt.errors import DiagnosticsError
from trainrt.run_dir import RunDir, read_json

STATIC = Path(__file__).parent / "static"
REFRESH_SECONDS = 0.5
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
POINTS = 2000


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
    reader = RunReader(directory)

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

    @app.get("/api/run")
    def run() -> JSONResponse:
        reader.refresh()
        plan = read_json(directory.plan) or {}
        plan.pop("parameters", None)
        cluster = directory.read_cluster() or {}
        return JSONResponse({"path": str(directory), "status": reader.status(), "plan": plan, "cluster": cluster})

    @app.get("/api/metrics")
    def metrics(after: int = 0) -> JSONResponse:
        reader.refresh()
        return JSONResponse({"lines": _thin([reader.metrics[step] for step in sorted(reader.metrics) if step > after])})

    @app.get("/api/heatmap")
    def heat() -> JSONResponse:
        reader.refresh()
        return JSONResponse(heatmap(reader))

    @app.get("/api/timeline")
    def events(step: int | None = None) -> JSONResponse:
        reader.refresh()
        return JSONResponse(timeline(reader, step))

    @app.get("/api/incidents")
    def incidents() -> JSONResponse:
        reader.refresh()
        return JSONResponse({"incidents": reader.incidents})

    @app.get("/api/stream")
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(_changes(request, reader), media_type="text/event-stream")

    @app.get("/metrics")
    def prometheus() -> Response:
        reader.refresh()
        return Response(exposition(reader), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _admitted(request: Request, token: str) -> bool:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    offered = request.query_params.get("token") or request.cookies.get("trainrt_token") or bearer
    return hmac.compare_digest(offered.encode(), token.encode())


def _thin(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about POINTS lines, evenly chosen, the last one always."""
    every = max(1, -(-len(lines) // POINTS))
    return [line for index, line in enumerate(lines) if index % every == 0 or index == len(lines) - 1]


async def _changes(request: Request, reader: RunReader) -> AsyncIterator[str]:
    """Server-sent events: the status, whenever it or any line of the run is new."""
    seen: Any = None
    while not await request.is_disconnected():
        status = reader.status()
        mark = (status, max(reader.metrics, default=0), len(reader.incidents), _stamp(reader.run_dir))
        if mark != seen:
            seen = mark
            yield f"event: change\ndata: {json.dumps(status)}\n\n"
        else:
            yield ": still here\n\n"
        await asyncio.sleep(REFRESH_SECONDS)


def _stamp(directory: RunDir) -> tuple[float, ...]:
    return tuple(p.stat().st_mtime if p.exists() else 0.0 for p in (directory.metrics, directory.incidents))
