"""A proxy in front of a local HTTP server that does to answers what networks and busy stores do to them."""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


@dataclass
class Faults:
    """What happens to requests; shares are of all that read an object, drawn by `seed` in the order of requests."""

    delay: float = 0.0  # seconds before each answer
    throttle: float = 0.0  # share answered by 503 SlowDown
    cut: float = 0.0  # share whose body ends halfway
    corrupt: float = 0.0  # share with one byte of the body changed
    hang: float = 0.0  # share that gets no answer
    coming: list[str] = field(default_factory=list)  # what becomes of the next requests, before any is drawn
    dead: bool = False  # nothing is answered: each connection is closed
    seed: int = 0
    counts: Counter = field(default_factory=Counter)  # requests by what became of them, and `bytes` sent on

    def draw(self, generator: random.Random) -> str:
        """What becomes of the next request."""
        if self.dead:
            return "dead"
        if self.coming:
            return self.coming.pop(0)
        value = generator.random()
        for name in ("throttle", "cut", "corrupt", "hang"):
            value -= getattr(self, name)
            if value < 0:
                return name
        return "whole"


class FaultyProxy:
    """The proxy on a port of its own; `faults` may be changed while it runs."""

    def __init__(self, target: str, faults: Faults):
        self.target = target.rstrip("/")
        self.faults = faults
        self._random = random.Random(faults.seed)
        self.corrupt_at: int | None = None  # the byte; a random one if not given
        self.url = ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self.faults.draw(self._random) if request.method == "GET" else "dead" if self.faults.dead else "whole"
        self.faults.counts[fault] += 1
        await asyncio.sleep(self.faults.delay)
        if fault == "throttle":
            return web.Response(status=503, body=SLOW_DOWN, content_type="application/xml")
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "dead":
            request.transport.abort()
            return web.Response()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        async with self._session.request(
            request.method, self.target + request.raw_path, headers=headers, data=body, allow_redirects=False
        ) as answer:
            return await self._send_on(request, answer, await answer.read(), fault)

    async def _send_on(
        self, request: web.Request, answer: aiohttp.ClientResponse, content: bytes, fault: str
    ) -> web.StreamResponse:
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        if fault == "corrupt" and content:
            place = self._random.randrange(len(content)) if self.corrupt_at is None else self.corrupt_at
            content = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        self.faults.counts["bytes"] += len(content)
        if fault != "cut" or not content:
            if request.method != "HEAD":
                headers["Content-Length"] = str(len(content))
            return web.Response(status=answer.status, body=content or None, headers=headers)
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        request.transport.abort()
        return response

    async def _run(self, started: threading.Event, stop: asyncio.Event) -> None:
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            application = web.Application(client_max_size=1 << 30)
            application.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            started.set()
            await stop.wait()
            await runner.cleanup()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.05)

    @contextlib.contextmanager
    def running(self) -> Iterator["FaultyProxy"]:
        """The proxy in a thread, as long as the block lasts."""
        started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(self._run(started, stop),), daemon=True)
        thread.start()
        if not started.wait(30):
            raise RuntimeError("the proxy did not start")
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
