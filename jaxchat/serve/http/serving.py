"""What a server serves, and where the handlers of requests find it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from jaxchat.infer.request import Tool
from jaxchat.serve.http.errors import ApiError
from jaxchat.serve.http.fields import shown
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.spelling import Spelling

if TYPE_CHECKING:
    from jaxchat.infer.engine import Engine  # imports JAX, which a run can be watched without


@dataclass(frozen=True)
class Served:
    """The model that answers.

    Attributes:
      name: what clients call it.
      stage: whose model it is.
      stages: those of the run that have a model, in order.
      created: when it was trained, in seconds since 1970.
      context, vocabulary, parameters: in tokens, ids and numbers.
      stops: ids that end an assistant's turn.
      tool: what answers its calls in a chat, and the tool's name.
    """

    name: str
    stage: str
    stages: tuple[str, ...]
    created: int
    context: int
    vocabulary: int
    parameters: int
    stops: tuple[int, ...]
    spelling: Spelling
    tool: Tool | None
    tool_name: str

    @property
    def base(self) -> bool:
        """Whether it is a base model, which continues text and knows no conversations."""
        return self.stage == "pretrain"

    @classmethod
    def of(
        cls,
        engine: Engine,
        *,
        name: str,
        stage: str,
        stages: tuple[str, ...] = (),
        created: float = 0.0,
        parameters: int = 0,
        tool: Tool | None = None,
        tool_name: str = "none",
    ) -> Served:
        """What an engine serves."""
        spelling = Spelling(engine.tokenizer)
        return cls(
            name=name,
            stage=stage,
            stages=stages or (stage,),
            created=int(created),
            context=engine.model_config.sequence_len,
            vocabulary=engine.tokenizer.vocab_size,
            parameters=parameters,
            stops=tuple(engine.stops),
            spelling=spelling,
            tool=None if stage == "pretrain" else tool,
            tool_name="none" if stage == "pretrain" else tool_name,
        )

    def check_name(self, name: str | None) -> None:
        """Raises an `ApiError` with status 404 if a request names another model."""
        if name not in (None, self.name):
            message = f"there is no model {shown(name)}; this server has {shown(self.name)}"
            raise ApiError(404, message, param="model", code="model_not_found")


@dataclass
class Server:
    """The state of a server, at `app.state.server`.

    Attributes:
      service: None if only a run is watched.
      served: None until the model is loaded.
      run_dir: None if no run is shown.
      key: what clients must send in `Authorization: Bearer`; None for no key.
      hosts: the names under which it may be reached; None for any.
      origins: other sites that may use it from a browser.
    """

    service: Service | None
    served: Served | None = None
    run_dir: str | None = None
    key: str | None = None
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = field(default=())


def server_of(request: Request) -> Server:
    return request.app.state.server


def ready(request: Request) -> tuple[Service, Served]:
    """The service and its model.

    Raises:
      ApiError: it cannot take requests now, or there is no model.
    """
    server = server_of(request)
    if server.service is None:
        raise ApiError(
            503, "this server only watches a run; start it without --watch to serve a model", code="no_model"
        )
    server.service.check_ready()
    assert server.served is not None
    return server.service, server.served
