"""Every guard that watches streams, made small and ready for the tests of what they all promise (test_contract.py).

Each one comes with a gate in front of what judges: tests hold it shut to see a session wait, or make it fail.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from edge_folder import LINES, tiny_edge_folder
from fake_gen import FakeGen
from serving import make_policy, serving
from tidegate.gateway.app import create_app
from tidegate.guards import StreamGuard
from tidegate.guards.cascade import CascadeConfig, CascadeGuard
from tidegate.guards.edge import EdgeGuard
from tidegate.guards.remote import RemoteConfig, RemoteGuard
from tidegate.guards.resilient import ResilientGuard
from tidegate.guards.session import OpenSessions
from tidegate.testing import FakeStreamGuard, FakeUpstream, Reply
from tidegate.types import Conversation

PROMPT = Conversation.of("how do i bake bread at home")
WINDOW = 96
"""Positions that a Stream model of the tests reads at once: its longer texts take several windows."""
AWKWARD = (
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "\ud83d", "\ude00", "e\u0301\u0327", "㎏", "\u0958", "ﬃ", "مرحبا", "한국어", "\u200b"),
    *("aaaaaaa", "  \n ", "\n\n", "<|end|>", "<|im_end|>", " bomb", " bomb bomb", " knife ", "poison"),
)
TEXTS = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.sampled_from(LINES), st.text(max_size=6)), max_size=8
).map("".join)  # fmt: skip
TEXT = "how do i build a bomb bomb and then some more of it, said the fox to the other dogs at home "
"""What any of them asks its model about, in parts, before the text ends."""


class Gate:
    """What everything that is judged goes through, in whatever thread."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self._entered = threading.Event()
        self.fails = False

    @property
    def shut(self) -> bool:
        return not self._go.is_set()

    def shut_it(self) -> None:
        self._entered.clear()
        self._go.clear()

    def open_it(self) -> None:
        self._go.set()

    async def reached(self) -> None:
        """Wait until somebody stands before it."""
        assert await asyncio.to_thread(self._entered.wait, 30)

    def enter(self) -> bool:
        """Go through; whether that is to fail."""
        self._entered.set()
        assert self._go.wait(30)
        return self.fails

    async def enter_in_loop(self) -> None:
        """The same, where waiting must not stop an event loop; RuntimeError when it is to fail."""
        self._entered.set()
        while self.shut:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        if self.fails:
            raise RuntimeError("the gate was told to fail")

    def before(self, judge: Callable[..., Any]) -> Callable[..., Any]:
        """The same function behind the gate."""

        def gated(*args: Any, **options: Any) -> Any:
            if self.enter():
                raise RuntimeError("the gate was told to fail")
            return judge(*args, **options)

        return gated


class GatedFake(FakeStreamGuard):
    """A `FakeStreamGuard` behind a gate."""

    def __init__(self, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self.gate = gate

    async def trouble(self) -> None:
        try:
            await self.gate.enter_in_loop()
        except RuntimeError:
            await self.trouble_at(self.failing)


@dataclass
class Watched:
    """A guard, and what the tests must know of it.

    Attributes:
        guard: the guard.
        gate: in front of what judges.
        opened: counts its sessions and limits them; None when nothing does.
        overlaps: whether calls to one session may overlap.
        opens_late: whether a session takes its place with the first piece of text, and not when it is opened.
        ends_at_once: whether closing a session ends its feed at once, and not when what it waits for is computed.
        at_rest: whether it holds nothing more, once nobody asks and the last question is answered.
        noise: largest difference of a probability that another order of adding makes; 0 for none.
    """

    guard: StreamGuard
    gate: Gate
    opened: OpenSessions | None
    overlaps: bool = False
    opens_late: bool = False
    ends_at_once: bool = False
    at_rest: Callable[[], bool] = lambda: True
    noise: float = 1e-5


@dataclass
class Place:
    """Where guards of the tests are made.

    Attributes:
        folder: for their files, which are written once.
        upstream: a fake server, and its address.
        monkeypatch: undone after the test.
    """

    folder: Path
    upstream: FakeUpstream
    url: str
    monkeypatch: pytest.MonkeyPatch

    def written(self, name: str, write: Callable[[Path], object]) -> Path:
        """The files of a guard, which are written the first time."""
        path = self.folder / name
        if not path.exists():
            write(path)
        return path

    def serve(self, gate: Gate, fake: Callable[[Any], Reply]) -> None:
        """Let the server answer like this, behind a gate."""
        self.upstream.reply = lambda body: Reply.error(400, "told to fail") if gate.enter() else fake(body)


Make = Callable[[Place, Gate], AbstractAsyncContextManager[Watched]]


@asynccontextmanager
async def fake(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    guard = GatedFake(gate)
    yield Watched(guard, gate, guard._sessions, noise=0)


@asynccontextmanager
async def fake_to_its_end(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    guard = GatedFake(gate, end_token=True, sticky=True)
    yield Watched(guard, gate, guard._sessions, noise=0)


@asynccontextmanager
async def cascade(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    """The gate is in front of the second guard."""
    first, second = FakeStreamGuard(end_token=True), GatedFake(gate, unsafe={"poison": "Violent"})
    guard = CascadeGuard(first, second, CascadeConfig(first="edge", second="edge"))
    yield Watched(
        guard,
        gate,
        first._sessions,
        ends_at_once=True,
        at_rest=lambda: guard._second.open_questions == 0,
        noise=0,
    )


@asynccontextmanager
async def resilient(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    inner = GatedFake(gate)
    yield Watched(ResilientGuard(inner, deadline_s=30), gate, inner._sessions, opens_late=True, noise=0)


@asynccontextmanager
async def edge(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    async with EdgeGuard(place.written("edge", _write_edge)) as guard:
        place.monkeypatch.setattr(guard._engine, "_run", gate.before(guard._engine._run))
        yield Watched(guard, gate, guard._open, at_rest=lambda: not guard._engine.waiting)


@asynccontextmanager
async def stream(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    pytest.importorskip("torch")
    from tidegate.guards.stream import Qwen3StreamGuard

    async with Qwen3StreamGuard(place.written("stream", _write_stream), positions=4 * WINDOW) as guard:
        runner: Any = guard._engine._runner
        place.monkeypatch.setattr(runner, "run", gate.before(runner.run))

        def at_rest() -> bool:
            metrics = guard.metrics()
            return (metrics.streams, metrics.cache_reserved, metrics.waiting_streams) == (0, 0, 0)

        yield Watched(guard, gate, guard._open, ends_at_once=True, at_rest=at_rest)
        with guard._engine._wake:
            guard._engine._scheduler.check()


@asynccontextmanager
async def gen(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    """What it says of a prompt follows from the prompt's ids: nobody waits for a model to be trained."""
    pytest.importorskip("torch")
    from tidegate.guards import gen as module

    place.monkeypatch.setattr(module, "_BLOCK", 24)
    guard = module.GenGuard(str(place.written("gen", _write_gen)))
    model: Any = guard._worker._model
    place.monkeypatch.setattr(model, "score", gate.before(_scored))
    async with guard:
        yield Watched(guard, gate, guard._open, ends_at_once=True, at_rest=lambda: not guard.waiting, noise=0)


@asynccontextmanager
async def remote(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    place.serve(gate, FakeGen())
    async with RemoteGuard(RemoteConfig(urls=(place.url,), model="guard-4b", rejudge_every=24)) as guard:
        await guard.judge(PROMPT)
        await guard.judge(Conversation.of("hello", "hello"))
        yield Watched(guard, gate, None, ends_at_once=True, noise=0)


@asynccontextmanager
async def vllm_stream(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    pytest.importorskip("torch")
    from tidegate.guards.vllm_stream import VllmStreamConfig, VllmStreamGuard

    from .test_vllm_stream import FakeVllm

    place.serve(gate, FakeVllm())
    async with VllmStreamGuard(VllmStreamConfig(urls=(place.url,))) as guard:
        await guard.judge(PROMPT)
        yield Watched(guard, gate, guard._open, overlaps=True, ends_at_once=True)


@asynccontextmanager
async def tidegate(place: Place, gate: Gate) -> AsyncIterator[Watched]:
    """The gate is in front of the guard of the server."""
    from tidegate.guards.tidegate_live import TidegateConfig, TidegateGuard

    app = create_app(guard=GatedFake(gate), policy=make_policy(), guard_timeout_s=None)
    with serving(app) as url:
        async with TidegateGuard(TidegateConfig(url=url)) as guard:
            yield Watched(guard, gate, guard._open, ends_at_once=True, at_rest=lambda: guard.streams == 0, noise=0)


GUARDS: dict[str, Make] = {
    "fake": fake,
    "fake with a verdict at the end": fake_to_its_end,
    "cascade": cascade,
    "resilient": resilient,
    "edge": edge,
    "stream": stream,
    "gen": gen,
    "remote": remote,
    "vllm-stream": vllm_stream,
    "tidegate": tidegate,
}


def _write_edge(path: Path) -> None:
    tiny_edge_folder(path)


def _write_stream(path: Path) -> None:
    from stream_folder import write_guard

    write_guard(path, max_position_embeddings=WINDOW)


def _write_gen(path: Path) -> None:
    from gen_folder import write_gen_folder

    path.mkdir()
    write_gen_folder(path, trained=False)


def _scored(form: Any, prompts: Sequence[Sequence[int]], *_: object) -> list[Any]:
    from tidegate.model.answers import Scores

    said = [("Safe", "Controversial", "Unsafe")[sum(ids) % 3] for ids in prompts]
    kind = form.lines[0].kind
    return [
        Scores(
            f"Safety: {label}\nCategories: {'None' if label == 'Safe' else 'Violent'}\nRefusal: No",
            {kind: {name: 0.8 if name == label else 0.1 for name in ("Safe", "Controversial", "Unsafe")}},
        )
        for label in said
    ]
