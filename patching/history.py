"""The last runs of the last pages, for a page that loads again: numbers only, and what draws masks of attention."""

import asyncio
from collections import OrderedDict, deque
from threading import Lock
from typing import Any

from aiohttp import web
from server import PromptServer

from .pictures import Sketch

RUNS, CLIENTS = 16, 16
PATH_RUNS, PATH_MASKS = "/tessera/runs", "/tessera/masks"


class History:
    """Of the newest CLIENTS pages the newest RUNS runs each."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[tuple[dict[str, Any], dict[int, Sketch]]]] = OrderedDict()
        self._lock = Lock()

    def add(self, client: str | None, record: dict[str, Any], sketches: dict[int, Sketch]) -> None:
        if client is None:
            return
        with self._lock:
            self._clients.setdefault(client, deque(maxlen=RUNS)).append((record, dict(sketches)))
            self._clients.move_to_end(client)
            while len(self._clients) > CLIENTS:
                self._clients.popitem(last=False)

    def runs(self, client: str) -> list[dict[str, Any]]:
        """Oldest first."""
        with self._lock:
            return [record for record, _ in self._clients.get(client, ())]

    def masks(self, client: str, run: str) -> dict[str, Any]:
        """Of each feature that drew one, by its place in the record."""
        with self._lock:
            found = [s for record, s in self._clients.get(client, ()) if record["run"] == run]
        return {str(number): draw() for sketches in found for number, draw in sketches.items()}


HISTORY = History()


def serve() -> None:
    """GET routes for the sidebar: /tessera/runs?client= and /tessera/masks?client=&run=."""

    async def runs(request):
        return web.json_response({"runs": HISTORY.runs(request.query.get("client", ""))})

    async def masks(request):
        asked = request.query.get("client", ""), request.query.get("run", "")
        return web.json_response(await asyncio.to_thread(HISTORY.masks, *asked))

    PromptServer.instance.routes.get(PATH_RUNS)(runs)
    PromptServer.instance.routes.get(PATH_MASKS)(masks)
