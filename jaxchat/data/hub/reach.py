"""Whether the hub can be reached from here, and what to do if not."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from huggingface_hub import constants, get_session, is_offline_mode

from jaxchat.devices.problems import Problem
from jaxchat.storage import first_line

PATIENCE = 5.0  # seconds; looking up a name cannot be interrupted, and may take longer
NO_NETWORK = "text of your own (--data=DIR) and quickstart need no network"


@dataclass(frozen=True)
class Answer:
    """What came of asking the hub: `seconds` until it answered, or a problem."""

    endpoint: str
    seconds: float = 0.0
    problem: Problem | None = None


class Question:
    """Asks the hub for its start page, in a thread; `answer` waits for what it says."""

    def __init__(self, patience: float = PATIENCE):
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._patience, self._until = patience, time.monotonic() + patience
        self._answer = self._problem(f"no answer within {patience:.0f} s")
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def answer(self) -> Answer:
        """What the hub has answered; waits until the patience that was given is over."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._answer

    def _problem(self, why: str, remedy: str = "") -> Answer:
        proxy = next(
            (name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)), ""
        )
        through = f" through {proxy}" if proxy else ""
        mend = [f"correct or unset {proxy}" if proxy else "check the network, or set HTTPS_PROXY if it needs a proxy"]
        mend += ["correct or unset HF_ENDPOINT"] if os.environ.get("HF_ENDPOINT") else []
        problem = Problem("hub", f"{self._endpoint} cannot be reached{through} ({why})",
                          "; ".join([*([remedy] if remedy else mend), NO_NETWORK]))  # fmt: skip
        return Answer(self._endpoint, problem=problem)

    def _ask(self) -> None:
        if is_offline_mode():
            self._answer = self._problem("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
            return
        began = time.monotonic()
        try:
            response = get_session().head(self._endpoint, timeout=self._patience)
        except Exception as error:  # of the HTTP library, which the hub's client has changed before
            self._answer = self._problem(first_line(error))
            return
        status = response.status_code
        if status >= 500 or status == 407:  # 407: the proxy wants a password
            self._answer = self._problem(f"it answers {status} {response.reason_phrase}".strip())
            return
        self._answer = Answer(self._endpoint, time.monotonic() - began)
