"""Stop after this block: a run of a block sampler ends early and keeps what is done. Its flag lives as long as the run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVENT = "tessera.blocks"  # to the page: node, running, block, blocks
ROUTE = "/tessera/stop_after_block"


class Watched:
    """One run."""

    def __init__(self, node: str | None):
        self.node, self._asked = node, threading.Event()

    @property
    def asked(self) -> bool:
        """Whether it shall end after the block that it works on."""
        return self._asked.is_set()

    def stop(self) -> None:
        self._asked.set()

    def tell(self, block: int, blocks: int, running: bool = True) -> None:
        """The node's button learns where the run stands."""
        if self.node is not None:
            _send({"node": self.node, "running": running, "block": block, "blocks": blocks, "stopping": self.asked})


_running: list[Watched] = []  # runs that are being sampled now


@contextmanager
def watch(node: str | None) -> Iterator[Watched]:
    """A run of the block sampler of that node, until it ends in any way."""
    run = Watched(node)
    _running.append(run)
    try:
        yield run
    finally:
        _running.remove(run)
        run.tell(0, 0, running=False)


def stop(node: str | None = None) -> list[str | None]:
    """Ends the runs of that node after their block, of all nodes where none is named -> the nodes whose runs will end."""
    found = [run for run in list(_running) if node is None or run.node == node]
    for run in found:
        run.stop()
    return [run.node for run in found]


def _send(message: dict[str, Any]) -> None:
    server = _server()
    if server is not None:
        server.send_sync(EVENT, message, getattr(server, "client_id", None))


def _server() -> Any:
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def register() -> None:
    """Adds the route; POST {"node": id}, or {} for whatever block sampler runs."""
    from server import web

    async def answer(request):
        try:
            asked = await request.json() if request.can_read_body else {}
        except ValueError:
            asked = None
        node = asked.get("node") if isinstance(asked, dict) else ()
        if not (node is None or isinstance(node, str | int)):
            return web.json_response({"error": 'Send {"node": id}, or {} for the block sampler that runs.'}, status=400)
        return web.json_response({"stopping": stop(None if node is None else str(node))})

    _server().routes.post(ROUTE)(answer)
