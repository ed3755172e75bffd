"""Routes of the service: OpenAI's embeddings and models, search, health, metrics."""

import base64
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse

from modeling_udon.encoder import Encoder
from modeling_udon.serving.gate import Access, Gate
from modeling_udon.serving.images import ImageService
from modeling_udon.serving.index_service import IndexService
from modeling_udon.serving.limits import Limits, ServiceError, refusal
from modeling_udon.serving.metrics import Metrics
from modeling_udon.serving.schemas import AddBody, EmbeddingsBody, RemoveBody, SearchBody
from modeling_udon.version import __version__

_LIVE, _READY = ("/health/live",), ("/health", "/health/ready")
_PATHS = (
    "/v1/embeddings",
    "/v1/models",
    "/search",
    "/index",
    "/index/add",
    "/index/remove",
    "/metrics",
    *_LIVE,
    *_READY,
)
_OPEN_PATHS = _LIVE + _READY
_GUARDED = "/index/"

_log = logging.getLogger(__name__)


@dataclass
class Service:
    """What the routes use.

    Attributes:
        name: What clients call the model.
        images: Embeds images.
        index: What is searched, if anything.
        limits: What requests may ask for.
        metrics: Counters and times.
        is_stopping: Whether no new requests should come.
        started: When it was started, in seconds since 1970.
    """

    name: str
    images: ImageService
    index: IndexService | None
    limits: Limits
    metrics: Metrics
    is_stopping: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that an embedding may have."""
        encoder: Encoder = self.images.encoder
        return (*encoder.nested_dims, encoder.dim)

    def close(self) -> None:
        """Ends its processes and threads."""
        self.images.close()
        if self.index is not None:
            self.index.close()


def make_app(service: Service, access: Access) -> Any:
    """Makes the ASGI application; it closes the service when it ends.

    Args:
        service: What the routes use.
        access: Who may ask.
    """

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="UDON", version=__version__, docs_url=None, redoc_url=None, lifespan=closing)
    app.state.service = service
    app.include_router(_routes)
    app.add_exception_handler(ServiceError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_wrong_body)
    app.add_exception_handler(StarletteHTTPException, _answer_status)
    app.add_exception_handler(Exception, _answer_fault)
    return Gate(app, service.limits, access, service.metrics, _PATHS, _OPEN_PATHS, _GUARDED)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Used = Annotated[Service, Depends(_service)]
_routes = APIRouter()


@_routes.post("/v1/embeddings")
async def embeddings(body: EmbeddingsBody, service: Used) -> JSONResponse:
    """Embeds images."""
    images = [body.input] if isinstance(body.input, str) else body.input
    most = service.limits.max_items
    if not 1 <= len(images) <= most:
        raise refusal(f"`input` must hold 1 to {most} images. Got {len(images)}; send them in parts.", "input")
    _check_model(service, body.model)
    dim = service.dims[-1] if body.dimensions is None else body.dimensions
    if dim not in service.dims:
        known = ", ".join(map(str, service.dims))
        raise refusal(f"`dimensions` must be one that the model has: {known}. Got {dim}; leave it out.", "dimensions")
    names = ["input"] if isinstance(body.input, str) else [f"input[{number}]" for number in range(len(images))]
    found = (await service.images.embed(images, names))[:, :dim]
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": number, "embedding": _encoded(vector, body.encoding_format)}
                for number, vector in enumerate(found.astype("<f4"))
            ],
            "model": service.name,
            # Clients expect it; images have no tokens.
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }
    )


@_routes.get("/v1/models")
async def models(service: Used) -> dict[str, Any]:
    """Names the model."""
    return {"object": "list", "data": [_about_model(service)]}


@_routes.get("/v1/models/{name:path}")
async def model(name: str, service: Used) -> dict[str, Any]:
    """Tells of the model."""
    _check_model(service, name)
    return _about_model(service)


@_routes.post("/search")
async def search(body: SearchBody, service: Used) -> dict[str, Any]:
    """Searches the index for the images most like one."""
    index = _index(service)
    query = None if body.vector is None else np.asarray(body.vector, np.float32)
    if body.image is not None:
        query = (await service.images.embed([body.image], ["image"]))[0]
    return await index.search(query, body)


@_routes.get("/index")
async def index(service: Used) -> dict[str, Any]:
    """Tells of the index."""
    return await _index(service).describe()


@_routes.post("/index/add")
async def add(body: AddBody, service: Used) -> dict[str, Any]:
    """Embeds images and adds them to the index in one commit."""
    opened = _index(service)
    opened.writable()
    most = service.limits.max_items
    if len(body.images) > most:
        raise refusal(f"`images` must hold 1 to {most}. Got {len(body.images)}; send them in parts.", "images")
    names = [f"images[{number}].image" for number in range(len(body.images))]
    read = await service.images.read([image.image for image in body.images], names, facts=True)
    return await opened.add(read, body)


@_routes.post("/index/remove")
async def remove(body: RemoveBody, service: Used) -> dict[str, Any]:
    """Removes images from the index in one commit."""
    return await _index(service).remove(body)


@_routes.head("/health/live", include_in_schema=False)
@_routes.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether the server answers."""
    return {"live": True}


@_routes.head("/health", include_in_schema=False)
@_routes.head("/health/ready", include_in_schema=False)
@_routes.get("/health")
@_routes.get("/health/ready")
async def ready(service: Used) -> JSONResponse:
    """Whether requests can be answered: 503 while the service stops, or where its encoder has failed."""
    is_ready = service.images.is_ready and not service.is_stopping
    return JSONResponse({"live": True, "ready": is_ready}, 200 if is_ready else 503)


@_routes.get("/metrics")
async def metrics(service: Used) -> Response:
    """Counters and times for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _index(service: Service) -> IndexService:
    if service.index is None:
        raise ServiceError(404, "the service has no index; start it with --index.", code="no_index")
    return service.index


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        message = f"`model` must be {service.name!r}. Got {name[:200]!r}; see /v1/models."
        raise ServiceError(404, message, "model", "model_not_found")


def _about_model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "udon",
        "dimensions": list(service.dims),
        "fingerprint": service.images.encoder.fingerprint,
    }


def _encoded(vector: np.ndarray, encoding_format: str) -> Any:
    return base64.b64encode(vector.tobytes()).decode() if encoding_format == "base64" else vector.tolist()


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_wrong_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "")
    if not re.match(r"application/(.+\+)?json\b", kind, re.IGNORECASE):
        rule = f"`Content-Type` must be application/json. Got {kind[:100] or 'none'}; send the body as JSON."
        return await _answer_error(request, refusal(rule, "Content-Type"))
    # Of a value that fits none of several types, the deepest place says most.
    found = max(error.errors(), key=lambda one: len(one["loc"]))
    param = _param(found["loc"])
    reason = re.sub(r"^Value error, ", "", str(found["msg"])).rstrip(".")
    where = f"`{param}`" if param else "the request's body"
    return await _answer_error(request, refusal(f"{where} must be as /openapi.json says: {reason}; change it.", param))


def _param(place: Sequence[str | int]) -> str | None:
    """The field that an error is about; the names of types that stand in its place are left out."""
    field_, *others = [*place[1:], None]
    numbers = "".join(f"[{part}]" for part in others if isinstance(part, int))
    return f"{field_}{numbers}" if isinstance(field_, str) else None


async def _answer_status(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:
        rule = "the request's body must be JSON in UTF-8, and not nested deeply. Got another; change it."
        return await _answer_error(request, refusal(rule))
    message = f"{request.method} {request.url.path[:200]} must be a request that /openapi.json lists: {error.detail}."
    return await _answer_error(request, ServiceError(error.status_code, message, code="unknown_url"))


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _answer_error(request, ServiceError(500, "the service failed; its log says why.", code="internal"))
