"""The command line: one short function per verb.

What is printed to stdout is data, what is printed to stderr is talk. Exit codes: 0 allowed, 1 flagged (any action above
ALLOW), 2 a usage or input error or a guard that is not there, 130 interrupted. Heavy modules are imported by the verbs
that need them.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
import importlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO, get_args

import typer
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tidegate import __version__
from tidegate.errors import GuardError, GuardUnavailable, InputError, StoreError, TidegateError
from tidegate.settings import LogFormat, Settings, log_format_asked, read_settings
from tidegate.types import (
    CATEGORIES,
    Action,
    Conversation,
    Decision,
    GuardFailure,
    Probabilities,
    Scope,
    Severity,
    Target,
    Verdict,
)

if TYPE_CHECKING:
    from socket import socket as Socket  # noqa: N812 - reads as a type
    from types import FrameType

    import uvicorn
    from rich.progress import Progress
    from starlette.applications import Starlette

    from tidegate.console.playground import Suggestion
    from tidegate.data.check import Tally
    from tidegate.gateway.entrance import EntranceOptions
    from tidegate.gateway.tracing import Tracing
    from tidegate.gateway.webhooks import Courier
    from tidegate.guards import Guard, StreamGuard
    from tidegate.guards.second import SecondGuard
    from tidegate.moderate import Step
    from tidegate.policy import Explanation, Policy, PolicySource, Replay, WatchedPolicy
    from tidegate.store import KeptDecision, Key, Store
    from tidegate.store.outbox import Address

__all__ = ["app"]

FLAGGED: Final = 1
WRONG: Final = 2
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141


class _Verbs(TyperGroup):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TidegateError as error:
            _say(f"tidegate: {error}", style="red")
            raise typer.Exit(WRONG) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush has somewhere to go
            raise typer.Exit(PIPE_CLOSED) from None
        except OSError as error:  # as a full disk: an exit code of 1 would say that a text was flagged
            where = f"{error.filename}: " if isinstance(error.filename, str) else ""
            _say(f"tidegate: {where}{error.strerror or type(error).__name__}", style="red")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(WRONG) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A safety guard in the token stream of any LLM.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a guard from a recipe.")
app.add_typer(train_app, name="train")
policy_app = typer.Typer(no_args_is_help=True, help="Policies: check a file, explain a decision, try a candidate.")
app.add_typer(policy_app, name="policy")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of clients: create, list, rotate, revoke.")
app.add_typer(keys_app, name="keys")
webhooks_app = typer.Typer(no_args_is_help=True, help="Webhooks: what waits, what was given up, try it again.")
app.add_typer(webhooks_app, name="webhooks")
decisions_app = typer.Typer(no_args_is_help=True, help="Kept decisions: show, export, delete, purge; how the store is.")
app.add_typer(decisions_app, name="decisions")

GuardOption = Annotated[str | None, typer.Option("--guard", metavar="SPEC", help="Which guard judges; see guards.")]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", metavar="FILE", help="A policy file, or a preset, as balanced.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="Where decisions are.", show_default="sqlite:///tidegate.db"),
]
HostOption = Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default="127.0.0.1")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"tidegate {__version__}")  # noqa: T201
        raise typer.Exit


# --- check --------------------------------------------------------------------------------------------------------


_ROWS_HELP: Final = (
    'Judge every row of this .jsonl or .jsonl.gz file: {"id": "1", "messages": [{"role": "user", "content": "..."}]}.'
)


@app.command()
def check(
    text: Annotated[str | None, typer.Argument(help="What a person wrote; - reads it from stdin.")] = None,
    response: Annotated[str | None, typer.Option(help="What a model answered; then this is judged.")] = None,
    file: Annotated[Path | None, typer.Option(help=_ROWS_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="Where the rows go; an interrupted run goes on there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    guard: GuardOption = None,
    policy: PolicyOption = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Rows that wait for the guard at once.")] = 32,
) -> None:
    """Judge a text, or a file of conversations. Exit code 0: allowed, 1: flagged, 2: something is wrong."""
    if (text is None) == (file is None):
        raise InputError("expected either a text or --file, and not both")
    if (file is None) != (out is None):
        raise InputError("--file and --out belong together")
    settings = read_settings(guard=guard, policy=policy)
    if file is not None and out is not None:
        if response is not None or as_json:
            raise InputError("--response and --json are for a single text, not for --file")
        raise typer.Exit(_check_file(file, out, settings, concurrency))
    conversation = Conversation.of(
        _given(text or "", "text"), None if response is None else _given(response, "response")
    )
    decision = asyncio.run(_check_one(conversation, settings))
    _print_json(_row(decision)) if as_json else _print_decision(decision)
    raise typer.Exit(FLAGGED if decision.action > Action.ALLOW else 0)


def _given(text: str, where: str) -> str:
    if text == "-" and where == "text":
        data = _open_stdin().buffer.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8: byte {error.start} cannot be read", where="stdin") from None
    if not text.strip():
        raise InputError("expected some text, got nothing but white space", where=where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("expected UTF-8", where=where) from None
    return text


def _open_stdin() -> TextIO:
    if sys.stdin is None:  # as after <&-
        raise InputError("it is closed", where="stdin")
    return sys.stdin


async def _check_one(conversation: Conversation, settings: Settings) -> Decision:
    from tidegate.moderate import moderate

    async with _judging(settings) as (guard, policy):
        decision = await moderate(conversation, guard=guard, policy=policy, timeout_s=settings.guard_timeout)
    if decision.failure is not None and decision.failure.kind == GuardUnavailable.__name__:
        raise GuardUnavailable(decision.failure.message)
    return decision


@contextlib.asynccontextmanager
async def _judging(settings: Settings) -> AsyncGenerator[tuple[StreamGuard, Policy], None]:
    from tidegate.policy import load_policy

    policy = load_policy(settings.policy)
    guard = _load_guard(settings)
    try:
        yield guard, policy
    finally:
        await guard.close()


def _row(decision: Decision) -> dict[str, Any]:
    from tidegate.data.check import checked_row

    return checked_row(None, decision)


def _check_file(source: Path, out: Path, settings: Settings, concurrency: int) -> int:
    from tidegate.data.check import bad_lines_path, check_file

    async def run() -> Tally:
        async with _judging(settings) as (guard, policy):
            with _lines_bar(source) as moved:
                return await check_file(
                    source,
                    out,
                    guard=guard,
                    policy=policy,
                    concurrency=concurrency,
                    progress=moved,
                    timeout_s=settings.guard_timeout,
                )

    tally = asyncio.run(run())
    for bad in tally.bad[:10]:
        _say(f"{source}:{bad.number}: {bad.reason}", style="yellow")
    if len(tally.bad) > 10:
        _say(f"… and {len(tally.bad) - 10:,} more", style="yellow")
    parts = [f"{tally.checked:,} checked", f"{tally.flagged:,} flagged"]
    if tally.resumed:
        parts.insert(1, f"{tally.resumed:,} of them by an earlier run")
    if tally.failures:
        parts.append(f"the guard failed on {tally.failures:,}")
    if tally.bad:
        parts.append(f"{len(tally.bad):,} bad lines set apart in {bad_lines_path(out)}")
    _say(", ".join(parts))
    return WRONG if tally.bad else FLAGGED if tally.flagged else 0


@contextlib.contextmanager
def _lines_bar(source: Path) -> Iterator[Callable[[int], None]]:
    from tidegate.data.check import count_lines

    with _bar("checking") as progress:
        task = progress.add_task("checking", total=count_lines(source))
        yield lambda number: progress.update(task, completed=number)


def _print_decision(decision: Decision) -> None:
    console = Console(highlight=False, soft_wrap=True)
    head = Text(decision.action.word.upper(), style=_STYLES[decision.action])
    if (verdict := decision.verdict) is not None:
        p = verdict.probabilities
        head.append(f"  {verdict.severity.word}", style="default not bold")
        numbers = f"safe {p.safe:.3f}, controversial {p.controversial:.3f}, unsafe {p.unsafe:.3f}"
        rows = [("probabilities", numbers), ("categories", ", ".join(verdict.categories) or "none named")]
        rows += [] if verdict.refusal is None else [("refusal", "yes" if verdict.refusal else "no")]
        rows += [("reason", _visible(verdict.reason))] if verdict.reason else []
        rows += [("guard", verdict.guard)]
    else:
        rows = [("guard failed", decision.failure.message if decision.failure else "")]
    console.print(head)
    rows += [("rule", f"{decision.rule} of {decision.policy} {decision.policy_version}")]
    rows += [("advice", ", ".join(advice.value for advice in decision.advice))] if decision.advice else []
    for name, value in rows:
        console.print(Text(f"  {name:<14}", style="dim").append(value, style="not dim"))


# --- watch --------------------------------------------------------------------------------------------------------


@app.command()
def watch(
    prompt: Annotated[str | None, typer.Option(help="What the text answers, as context for the guard.")] = None,
    guard: GuardOption = None,
    policy: PolicyOption = None,
) -> None:
    """Judge stdin as it comes and print what may pass; stop at BLOCK. Exit code 0: allowed, 1: flagged."""
    settings = read_settings(guard=guard, policy=policy)
    context = None if prompt is None else Conversation.of(_given(prompt, "prompt"))
    decision = asyncio.run(_watch(settings, context))
    raise typer.Exit(FLAGGED if decision.action > Action.ALLOW else 0)


async def _watch(settings: Settings, context: Conversation | None) -> Decision:
    from tidegate.moderate import moderate_stream

    show = _Painter()
    async with (
        _judging(settings) as (guard, policy),
        _confirming(settings, policy) as second,
        contextlib.aclosing(_stdin()) as pieces,
    ):
        steps = moderate_stream(
            pieces, guard=guard, policy=policy, context=context, timeout_s=settings.guard_timeout, second=second
        )
        async with contextlib.aclosing(steps):
            async for step in steps:
                show.step(step)
                if step.decision is not None:
                    show.end(step.decision)
                    return step.decision
    raise InputError("the stream ended without a decision")


@contextlib.asynccontextmanager
async def _confirming(settings: Settings, policy: Policy) -> AsyncGenerator[SecondGuard | None, None]:
    """Who confirms alarms of a stream, where the policy has them confirmed."""
    from tidegate.guards.second import SecondGuard

    if not policy.confirm.enabled:
        yield None
        return
    confirmer = _load_confirmer(settings)
    if confirmer is None:
        said = f"an alarm that nobody confirms is as confirm.on_error says, {policy.confirm.on_error}"
        _say(f"TIDEGATE_CONFIRM_GUARD is not set, and the policy says confirm: {said}", style="yellow")
        yield None
        return
    try:
        yield SecondGuard(confirmer, timeout_s=settings.confirm_timeout)
    finally:
        await confirmer.close()


async def _stdin() -> AsyncGenerator[str, None]:
    """Standard input as it comes, decoded; read in a thread, because a terminal or a pipe may be silent for long."""
    loop = asyncio.get_running_loop()
    source = _open_stdin().fileno()
    arrived: asyncio.Queue[bytes | OSError] = asyncio.Queue()
    room = threading.Semaphore(16)

    def read() -> None:
        data: bytes | OSError = b"-"
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody listens any more
            while data and not isinstance(data, OSError):
                room.acquire()
                try:
                    data = os.read(source, 4096)
                except OSError as error:
                    data = error
                loop.call_soon_threadsafe(arrived.put_nowait, data)

    threading.Thread(target=read, name="tidegate-stdin", daemon=True).start()
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    while True:
        data = await arrived.get()
        room.release()
        if isinstance(data, OSError):
            raise InputError(f"cannot be read: {data.strerror}", where="stdin")
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 near byte {position + error.start}", where="stdin") from None
        position += len(data)
        if text:
            yield text
        if not data:
            return


class _Painter:
    """Prints what is released: as it is to a file or pipe, tinted by the probability of harm to a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._tints: list[tuple[int, float]] = []
        self._printed = 0
        self._at_line_start = True

    def step(self, step: Step) -> None:
        """Print the text that may leave now."""
        self._tints += [(token.span.end, token.probabilities.flagged) for token in step.tokens]
        if not step.released:
            return
        self._at_line_start = step.released.endswith("\n")
        if not self._console.is_terminal:
            sys.stdout.write(step.released)
            sys.stdout.flush()
            return
        self._console.print(self._tinted(step.released), end="", soft_wrap=True)

    def end(self, decision: Decision) -> None:
        """Say on stderr how it ended."""
        if self._console.is_terminal and not self._at_line_start:
            self._console.print()
        verdict = decision.verdict
        why = f"{verdict.severity.word} {', '.join(verdict.categories)}".strip() if verdict else "the guard failed"
        rule = f"rule {decision.rule} of {decision.policy} {decision.policy_version}"
        stopped = "stopped" if decision.action >= Action.BLOCK else "passed"
        _say(f"{decision.action.word.upper()}: {stopped}, {why} ({rule})", style=_STYLES[decision.action])

    def _tinted(self, released: str) -> Text:
        text = Text()
        while released:
            while self._tints and self._tints[0][0] <= self._printed:
                self._tints.pop(0)
            end, probability = self._tints[0] if self._tints else (self._printed + len(released), 0.0)
            part, released = released[: end - self._printed], released[end - self._printed :]
            self._printed += len(part)
            text.append(_visible(part), style=_tint(probability))
        return text


def _tint(probability: float) -> Style:
    """Nothing for what is safe, then from amber to red."""
    if probability < 0.15:
        return Style()
    green = round(190 * (1 - probability))
    return Style(color=f"#e6{green:02x}32", bold=probability >= 0.5)


def _visible(text: str) -> str:
    """Control characters shown as pictures, so that a text cannot take the terminal over."""
    return "".join(_picture(character) for character in text)


def _picture(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F or code > 0x9F:
        return character
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


# --- serve --------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    upstream: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server, as http://127.0.0.1:8000/v1.")
    ] = None,
    policy: PolicyOption = None,
    guard: GuardOption = None,
    host: HostOption = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8080")
    ] = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="Where decisions are kept.", show_default="sqlite:///tidegate.db")
    ] = None,
    auth: Annotated[
        str | None, typer.Option(help="Who is let in: none, or keys.", show_default="none, on this machine only")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Processes that serve.", show_default="1")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Start the demo upstream too: no LLM needed.")] = False,
) -> None:
    """Serve the gateway (for programs) and the playground (for people)."""
    if demo and upstream is not None:
        raise InputError("--demo starts an upstream of its own: leave --upstream out")
    with _errors_as_logged(), _demo_running() if demo else contextlib.nullcontext(upstream) as url:
        given: dict[str, Any] = {
            "upstream_url": url,
            "policy": policy,
            "guard": guard,
            "host": host,
            "port": port,
            "database_url": database,
            "auth": auth,
            "workers": workers,
        }
        settings = read_settings(**given)
        if settings.workers > 1:
            _serve_workers(settings, given, demo=demo)
        else:
            _serve(settings, demo=demo)


@contextlib.contextmanager
def _errors_as_logged() -> Iterator[None]:
    """What ends a server is said in the form of its log, also where its settings could not be read."""
    try:
        yield
    except (TidegateError, OSError) as error:
        if log_format_asked() == "text":
            raise
        words = (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
        _tell(f"tidegate: {words}", "json", logging.ERROR)
        raise typer.Exit(WRONG) from None


@app.command("demo-upstream")
def demo_upstream(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8090,
) -> None:
    """Serve written answers as an OpenAI-compatible upstream. A demo: there is no model in it."""
    from tidegate.gateway.demo import DEMO_NOTICE, create_demo_upstream

    with _listening(host, port) as socket:
        words = (f"OpenAI API   {_address(socket)}/v1", DEMO_NOTICE)
        _run_server(_server_config(create_demo_upstream(), _DEMO_SHUTDOWN, "info"), socket, words)


_DEMO_SHUTDOWN: Final = 2
"""Seconds that the demo's open answers may go on when it is told to stop."""


def _serve(settings: Settings, *, demo: bool) -> None:
    from tidegate.guards import load_guard

    auth = settings.check_entrance()
    policy = _watched_policy(settings)
    guard = _load_guard(settings)
    fallback = None if settings.guard == "edge" else load_guard("edge")
    confirmer = _load_confirmer(settings)
    with (
        _listening_as_set(settings) as socket,
        _open_store(settings) as store,
    ):
        with _naming(settings):
            application = _application(settings, guard, fallback, confirmer, policy, store, demo=demo)
        _warn_open(settings, auth, store)
        _run_server(_settings_config(settings, application), socket, _addresses(settings, socket), settings.log_format)


def _serve_workers(settings: Settings, given: dict[str, Any], *, demo: bool) -> None:
    """Supervise workers, which read the settings again when they start: a restart takes a new secret from its file."""
    from tidegate.gateway.workers import Workers

    if settings.database_url in ("sqlite://", "sqlite:///:memory:"):
        raise InputError(
            "several workers need a database that is not in memory only", where=settings.called("database_url")
        )
    auth = settings.check_entrance()  # what is wrong here is said once, and not by each worker
    _watched_policy(settings)
    with _open_store(settings) as store:
        _warn_open(settings, auth, store)
    with (
        _listening_as_set(settings) as socket,
        tempfile.TemporaryDirectory(prefix="tidegate-metrics-") as folder,
    ):
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        words = _addresses(settings, socket)
        config = _settings_config(
            settings,
            functools.partial(_worker, given, demo=demo),
            factory=True,
            workers=settings.workers,
            timeout_worker_healthcheck=_WORKER_PATIENCE,
        )

        def started() -> None:
            for line in words:
                _tell(line, settings.log_format)

        workers = Workers(config, [socket], Path(folder), started)
        workers.run()
    if workers.interrupted:
        raise KeyboardInterrupt
    if workers.failed:
        raise TidegateError("a worker could not start; its messages are above")


_WORKER_PATIENCE: Final = 60
"""Seconds that a worker may take to start, and to say that it is well."""


def _worker(given: dict[str, Any], *, demo: bool) -> Starlette:
    """The gateway of one worker. What is wrong ends it in a way that makes the supervisor give up."""
    from uvicorn.config import STARTUP_FAILURE

    from tidegate.gateway.workers import end_with_parent
    from tidegate.guards import load_guard

    end_with_parent()
    try:
        settings = read_settings(**given)
        guard = _load_guard(settings)
        fallback = None if settings.guard == "edge" else load_guard("edge")
        confirmer = _load_confirmer(settings)
        policy = _watched_policy(settings)
        with _naming(settings):
            return _application(settings, guard, fallback, confirmer, policy, _open_store(settings), demo=demo)
    except TidegateError as error:
        _tell(f"tidegate: {error}", log_format_asked(), logging.ERROR)
        raise SystemExit(STARTUP_FAILURE) from None


def _watched_policy(settings: Settings) -> WatchedPolicy:
    """The policy of the settings, now and as it changes: one that can be carried out with them."""
    from tidegate.policy import WatchedPolicy, unconfirmed

    policy = WatchedPolicy(settings.policy)
    if settings.confirm_guard is None:
        policy.require(unconfirmed)
    return policy


@contextlib.contextmanager
def _naming(settings: Settings, setting: str | None = None) -> Iterator[None]:
    """What is wrong with the value of a setting is said with the setting's name, as it was given.

    Args:
        settings: all of them.
        setting: whose value is used in the block; None where errors name the setting themselves, in their place.
    """
    try:
        yield
    except InputError as error:
        if setting is not None and error.where in (None, "guard", setting):
            where: str | None = settings.called(setting)
        elif error.where in Settings.model_fields:
            where = settings.called(error.where)
        else:
            where = error.where if setting is None else f"{settings.called(setting)}: {error.where}"
        raise type(error)(error.message, where=where) from None
    except GuardUnavailable as error:
        raise GuardUnavailable(str(error) if setting is None else f"{settings.called(setting)}: {error}") from None


def _load_guard(settings: Settings) -> StreamGuard:
    from tidegate.guards import load_guard

    with _naming(settings, "guard"):
        if settings.adapters:
            return load_guard(settings.guard, adapters=settings.adapters)
        return load_guard(settings.guard)


def _load_confirmer(settings: Settings) -> StreamGuard | None:
    from tidegate.guards import load_guard

    if settings.confirm_guard is None:
        return None
    with _naming(settings, "confirm_guard"):
        return load_guard(settings.confirm_guard)


def _addresses(settings: Settings, socket: Socket) -> tuple[str, ...]:
    address = _address(socket, secure=settings.tls_cert is not None)
    words = (f"playground   {address}/playground", f"OpenAI API   {address}/v1", f"health       {address}/healthz")
    if settings.upstream_url is not None:
        return words
    return *words, "There is no upstream: texts are judged, but models are asked only with --upstream URL or --demo."


_DRAIN_SHARE: Final = 0.8
"""What part of the time to shut down live streams may go on: the rest is for decisions to be kept."""


def _warn_open(settings: Settings, auth: str, store: Store) -> None:
    """Say what is open, and who cannot come in."""
    if auth == "none" and not settings.local:
        whose = " with its key for the upstream" if settings.upstream_key is not None else ""
        _tell(
            f"everybody who reaches {settings.host} is let in{whose}: TIDEGATE_AUTH is none",
            settings.log_format,
            logging.WARNING,
        )
    if auth == "keys" and not store.keys.list():
        _tell(
            "there is no key yet, so nobody is let in: make one with tidegate keys create",
            settings.log_format,
            logging.WARNING,
        )


def _connection_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told about connections: their bounds, and TLS."""
    import ssl

    from tidegate.gateway.connections import Bounds

    bounds = Bounds(
        connections=settings.max_connections,
        head_bytes=settings.max_header_bytes,
        head_lines=settings.max_headers,
        head_s=settings.header_timeout,
        request_s=settings.read_timeout,
    )
    if settings.tls_cert is None:
        return {"bounds": bounds}
    cert, key = str(settings.tls_cert), str(settings.tls_key or settings.tls_cert)
    options = {
        "ssl_certfile": cert,
        "ssl_keyfile": key,
        "ssl_ca_certs": str(settings.tls_client_ca) if settings.tls_client_ca else None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
    }
    try:  # so that what is wrong with the files is one line, and not a traceback of the server
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, lambda: "")
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"the certificate or its key cannot be used: {reason}", where=settings.called("tls_cert")
        ) from None
    return {"bounds": bounds, **options}


def _entrance(settings: Settings, store: Store) -> EntranceOptions:
    from tidegate.gateway.entrance import EntranceOptions
    from tidegate.gateway.limits import LimitOptions
    from tidegate.store import Allowance

    auth = settings.check_entrance()
    if auth == "keys" and settings.database_url == "sqlite://":
        raise InputError("keys need a database that is not in memory only", where=settings.called("database_url"))
    return EntranceOptions(
        keys=store.keys if auth == "keys" else None,
        keys_age_s=settings.keys_max_age,
        open_doors=settings.open_doors or (),
        limits=LimitOptions(
            Allowance(settings.tenant_per_minute, settings.tenant_burst, settings.tenant_concurrent),
            settings.subject_per_minute,
            settings.throttle_factor,
            settings.throttle_seconds,
        ),
        redis_url=settings.redis_url,
        secret=store.derived_key("shared"),
        remembered=settings.verdict_memory,
        remembered_s=settings.verdict_memory_seconds,
        read_timeout_s=settings.read_timeout,
        hosts=settings.allowed_hosts or (),
    )


def _application(
    settings: Settings,
    guard: StreamGuard,
    fallback: StreamGuard | None,
    confirmer: Guard | None,
    policy: PolicySource,
    store: Store,
    *,
    demo: bool,
) -> Starlette:
    """The gateway and the console in one app; it closes the guards and the store when it ends."""
    from tidegate.console.app import create_console
    from tidegate.gateway.app import create_app
    from tidegate.gateway.asking import Asking
    from tidegate.gateway.live import LiveLimits
    from tidegate.gateway.upstream import Upstream
    from tidegate.guards.breaker import BreakerOptions
    from tidegate.guards.second import SecondGuard

    key = None if settings.upstream_key is None else settings.upstream_key.get_secret_value()
    tracing = _tracing(settings)
    asking = None
    if settings.upstream_url is not None:
        upstream = Upstream(
            settings.upstream_url,
            key=key,
            connect_timeout_s=settings.upstream_connect_timeout,
            silence_timeout_s=settings.upstream_read_timeout,
            tracing=tracing,
        )
        asking = Asking(upstream)
    console = create_console(
        guard=guard,
        policy=policy,
        answer=asking.ask if asking else None,
        upstream="the demo upstream: written answers, no model" if demo else settings.upstream_url or "",
        keep=store.keep,
        suggestions=_suggestions(demo=demo),
        guard_timeout_s=settings.guard_timeout,
        second=None if confirmer is None else SecondGuard(confirmer, timeout_s=settings.confirm_timeout),
    )
    return create_app(
        guard=guard,
        policy=policy,
        fallback=fallback,
        breaker=BreakerOptions(),
        confirmer=confirmer,
        confirm_timeout_s=settings.confirm_timeout,
        continues=settings.upstream_continues,
        keep=store.keep,
        upstream_url=settings.upstream_url,
        upstream_key=key,
        longest_body=settings.max_body_bytes,
        longest_stream=settings.max_stream_bytes,
        guard_timeout_s=settings.guard_timeout,
        client_timeout_s=settings.client_timeout,
        connect_timeout_s=settings.upstream_connect_timeout,
        silence_timeout_s=settings.upstream_read_timeout,
        judge_system=settings.judge_system,
        trusted_fields=settings.trusted_fields or (),
        live=LiveLimits(
            frame_bytes=settings.max_body_bytes,
            idle_s=settings.upstream_read_timeout,
            drain_s=settings.shutdown_timeout * _DRAIN_SHARE,
        ),
        entrance=_entrance(settings, store),
        tracing=tracing,
        courier=_courier(settings, store),
        routes=console,
        on_close=[*((asking.close,) if asking else ()), store.aclose],
    )


def _tracing(settings: Settings) -> Tracing | None:
    if settings.traces == "none":
        return None
    asked = f"{settings.called('traces')}: {settings.traces}"
    provider = _from_extra("otel", "tidegate.gateway.tracing", "otlp_provider", asked=asked)()
    tracing: Tracing = _from_extra("otel", "tidegate.gateway.tracing", "Tracing", asked=asked)(provider)
    return tracing


def _suggestions(*, demo: bool) -> Sequence[Suggestion]:
    from tidegate.console.playground import PROMPTS, TEXTS, Suggestion
    from tidegate.gateway.demo import DEMO_PROMPTS

    asked = [Suggestion(prompt, prompt, hint=about) for prompt, about in DEMO_PROMPTS] if demo else PROMPTS
    return (*asked, *TEXTS)


@contextlib.contextmanager
def _demo_running() -> Iterator[str]:
    """The demo upstream in a thread of its own, on a free port; gives its URL."""
    import uvicorn

    from tidegate.gateway.demo import create_demo_upstream

    with _listening("127.0.0.1", 0) as socket:
        server = uvicorn.Server(_server_config(create_demo_upstream(), _DEMO_SHUTDOWN, "warning"))
        thread = threading.Thread(target=server.run, args=([socket],), name="tidegate-demo", daemon=True)
        thread.start()
        try:
            yield f"{_address(socket)}/v1"
        finally:
            server.should_exit = True
            thread.join(_DEMO_SHUTDOWN + 1)


@contextlib.contextmanager
def _listening(
    host: str, port: int, client_timeout: float | None = None, *, where: str = "host and port"
) -> Iterator[Socket]:
    """A listening socket; bound here so that a taken port is a clear error, and a free one is known.

    ``where`` is what the error calls the two.

    Where the system can (Linux), it also ends the connection of a client that takes nothing for twice
    ``client_timeout`` seconds: after the gateway gave it up, what is unsent would otherwise stay as long as the client.
    """
    import socket as sockets

    with contextlib.ExitStack() as opened:
        try:
            family, kind, protocol, _, address = sockets.getaddrinfo(
                host, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE
            )[0]
            listening = opened.enter_context(sockets.socket(family, kind, protocol))
            listening.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
            if client_timeout is not None and hasattr(sockets, "TCP_USER_TIMEOUT"):
                listening.setsockopt(
                    sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT, max(1, round(client_timeout * 2000))
                )
            listening.bind(address)
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port}: {error.strerror}", where=where) from None
        yield listening


def _listening_as_set(settings: Settings) -> AbstractContextManager[Socket]:
    where = f"{settings.called('host')} and {settings.called('port')}"
    return _listening(settings.host, settings.port, settings.client_timeout, where=where)


def _address(socket: Socket, *, secure: bool = False) -> str:
    host, port = socket.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http{'s' if secure else ''}://{shown}:{port}"


def _run_server(config: uvicorn.Config, socket: Socket, words: Sequence[str], form: LogFormat = "text") -> None:
    """Run until a signal says stop; say the words, in the form of its log, once it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[Socket] | None = None) -> None:
            await super().startup(sockets)
            for line in words if self.started else ():
                _tell(line, form)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.interrupted = sig == signal.SIGINT
            super().handle_exit(sig, frame)

        interrupted = False

    server = Server(config)
    server.run([socket])
    if server.interrupted:  # uvicorn raises the signal again, but it may arrive when nobody waits for it any more
        raise KeyboardInterrupt
    if not server.started:
        raise TidegateError("the server could not start; its messages are above")


def _server_config(
    application: Starlette | Callable[[], Starlette],
    shutdown_timeout: float,
    log_level: str,
    *,
    log_format: LogFormat = "text",
    access: bool = False,
    **options: Any,
) -> uvicorn.Config:
    from tidegate.gateway.connections import BoundedConfig
    from tidegate.gateway.draining import DrainingWebSockets
    from tidegate.gateway.logs import log_config

    return BoundedConfig(
        application,
        log_config=log_config(log_level, log_format, access=access or log_level == "debug"),
        access_log=False,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout)),
        server_header=False,
        ws=DrainingWebSockets,
        ws_ping_interval=_PING_S,
        ws_ping_timeout=_PING_S,
        ws_per_message_deflate=False,  # small frames that should arrive at once, and no memory for each connection
        **options,
    )


def _settings_config(
    settings: Settings, application: Starlette | Callable[[], Starlette], **options: Any
) -> uvicorn.Config:
    return _server_config(
        application,
        settings.shutdown_timeout,
        settings.log_level,
        log_format=settings.log_format,
        access=settings.access_log,
        ws_max_size=settings.max_body_bytes,
        **_connection_options(settings),
        **options,
    )


_PING_S: Final = 20.0
"""Seconds between pings of a WebSocket, and until the answer to one; then its client is taken to be gone."""


# --- kept decisions -----------------------------------------------------------------------------------------------


@decisions_app.command("export")
def export_decisions(
    out: Annotated[Path | None, typer.Option(help="A .jsonl or .parquet file; without it, JSONL on stdout.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="From then on: 7d, 12h, 2026-11-21T08:00Z.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="From before then.")] = None,
    action: Annotated[str | None, typer.Option(help="Only those with this action.")] = None,
    subject: Annotated[str | None, typer.Option(metavar="ID", help="Only those about this subject.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose subject it is.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Write kept decisions as JSONL or Parquet, oldest first."""
    from tidegate.store.export import write_jsonl

    with _kept(database) as store:
        decisions = store.history(
            since=_time(since, "since"),
            until=_time(until, "until"),
            action=None if action is None else _action(action),
            subject=subject,
            tenant=tenant,
        )
        if out is None:
            write_jsonl(decisions, sys.stdout)
            return
        if out.suffix == ".parquet":
            write_parquet = _from_extra("parquet", "tidegate.store.parquet", "write_parquet", asked="--out: .parquet")
            with open(out, "wb", opener=_private) as binary:
                count = write_parquet(decisions, binary)
        elif out.suffix == ".jsonl":
            with open(out, "w", encoding="ascii", opener=_private) as file:
                count = write_jsonl(decisions, file)
        else:
            raise InputError("expected a name that ends with .jsonl or .parquet", where=str(out))
    _say(f"{count:,} decisions: {out}")


@decisions_app.command("show")
def show_decision(
    identity: Annotated[str, typer.Argument(metavar="ID", help="The decision's id, as clients and webhooks are told.")],
    database: DatabaseOption = None,
) -> None:
    """Print one kept decision, as export writes it: one JSON object."""
    from tidegate.store.export import write_jsonl

    write_jsonl([_kept_decision(identity, database)], sys.stdout)


def _kept_decision(identity: str, database: str | None) -> KeptDecision:
    with _kept(database) as store:
        kept = asyncio.run(store.decision(identity))
    if kept is None:
        raise InputError("there is no such decision", where="decision")
    return kept


@decisions_app.command("delete")
def delete_decisions(
    subject: Annotated[str, typer.Option(metavar="ID", help="Whose decisions, as the client named them.")],
    tenant: Annotated[str | None, typer.Option(help="Whose subject it is.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Delete every decision about a subject, for good. That it was done stays written down."""
    with _kept(database) as store:
        store.replay()
        _print_json({"deleted": store.delete_subject(subject, tenant)})


@decisions_app.command("purge")
def purge_decisions(
    older_than: Annotated[str, typer.Option(metavar="TIME", help="From before then: 90d, or 2026-11-21T08:00Z.")],
    retention: Annotated[str | None, typer.Option(help="Only those kept so: full, redacted or hash.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Delete every decision that is too old, for good. That it was done stays written down."""
    from tidegate.policy import Retention

    kinds: tuple[Retention, ...] = get_args(Retention)
    if retention is not None and retention not in kinds:
        raise InputError(f"expected one of {', '.join(kinds)}", where="retention")
    before = _time(older_than, "older-than")
    with _kept(database) as store:
        if before is not None:
            kind = next((kind for kind in kinds if kind == retention), None)
            _print_json({"deleted": store.purge(before, retention=kind)})


@decisions_app.command("status")
def decisions_status(database: DatabaseOption = None) -> None:
    """Replay what waits in the spool, then say how many decisions there are, and what still waits."""
    with _kept(database) as store:
        with contextlib.suppress(StoreError):  # the state says why
            store.replay()
        state = store.state()
        counts = asyncio.run(store.counts()) if state.up else {}
        figures = {"up": state.up, "reason": state.reason, "spool_bytes": state.spool_bytes}
        _print_json({**figures, "decisions": {action.word: number for action, number in counts.items()}})
    if not state.up:
        raise typer.Exit(WRONG)


def _private(path: str, flags: int) -> int:
    """Opens a file; a new one is readable by its owner only, as it may hold what people wrote."""
    return os.open(path, flags, 0o600)


def _open_store(settings: Settings) -> Store:
    from tidegate.store import open_store

    key = None if settings.fingerprint_key is None else bytes.fromhex(settings.fingerprint_key.get_secret_value())
    with _naming(settings, "webhooks"):
        address = None if settings.webhooks is None else _address_of(settings.webhooks)
    with _naming(settings):
        return open_store(
            settings.database_url,
            spool=settings.spool,
            spool_bytes=settings.spool_bytes,
            key=key,
            keep_days=settings.keep_days,
            address=address,
        )


def _address_of(webhooks: Path) -> Address:
    """Which webhooks are told of a decision; also where a command brings decisions from the spool to the database."""
    from tidegate.gateway.webhooks import addressed, read_webhooks

    return addressed(read_webhooks(webhooks))


def _courier(settings: Settings, store: Store) -> Courier | None:
    from tidegate.gateway.webhooks import Courier, read_webhooks

    return None if settings.webhooks is None else Courier(store.outbox, read_webhooks(settings.webhooks))


def _kept(database: str | None) -> Store:
    """The store of the settings, which must be there already; nothing in it is purged by the way."""
    settings = read_settings(database_url=database)
    before, in_file, path = settings.database_url.partition("sqlite:///")
    if not before and in_file and not Path(path).is_file():
        raise InputError("there is no such database", where=path)
    return _open_store(settings.model_copy(update={"keep_days": None}))


_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO: Final = re.compile(rf"([0-9]{{1,6}})([{''.join(_UNITS)}])")


def _time(given: str | None, where: str) -> datetime | None:
    """A time, or how long ago: ``7d``. One without a zone is of this machine's."""
    if given is None:
        return None
    try:
        if _AGO.fullmatch(given):
            return datetime.now(UTC) - _duration(given, where)
        return datetime.fromisoformat(given).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError("expected how long ago, as 7d or 12h, or a time, as 2026-11-21T08:00Z", where=where) from None


def _action(word: str) -> Action:
    try:
        return Action.parse(word)
    except ValueError as error:
        raise InputError(str(error), where="action") from None


# --- webhooks -----------------------------------------------------------------------------------------------------


@webhooks_app.command("status")
def webhooks_status(database: DatabaseOption = None) -> None:
    """Print how it stands with each webhook: one JSON object a line. The exit code is 1 when any was given up."""
    with _kept(database) as store:
        standings = store.outbox.standings()
    for name, standing in standings.items():
        figures = {"waiting": standing.waiting, "dead": standing.dead, "oldest": standing.oldest.isoformat()}
        _print_json({"webhook": name, **figures, "error": standing.error})
    if any(standing.dead for standing in standings.values()):
        raise typer.Exit(FLAGGED)


@webhooks_app.command("retry")
def retry_webhooks(
    webhook: Annotated[str | None, typer.Option(metavar="NAME", help="Only this one.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Have what was given up tried again, by the gateways that run."""
    with _kept(database) as store:
        _say(f"{store.outbox.retry(webhook):,} deliveries are tried again")


# --- keys ---------------------------------------------------------------------------------------------------------

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id; keys list shows it.")]


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="For whom it speaks.")],
    name: Annotated[str, typer.Option(help="For people who look for it.", show_default="the tenant")] = "",
    region: Annotated[str | None, typer.Option(help="Where that is, for the policy.")] = None,
    door: Annotated[
        list[str] | None,
        typer.Option(
            help="What it opens, as chat or metrics; repeatable.", show_default="all doors of models and guards"
        ),
    ] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests per minute.")] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="Requests at once after a pause.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Exchanges at once.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter of the guard.")] = None,
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="When it ends: 90d, 2027-01-01.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Make a key for a tenant, and print it: it cannot be shown again."""
    from tidegate.store import Allowance
    from tidegate.store.keys import USUAL_DOORS

    settings = read_settings(database_url=database)
    if adapter is not None and settings.adapters and adapter not in settings.adapters:
        _say(f"{adapter} is none of TIDEGATE_ADAPTERS: its texts cannot be judged until it is", style="yellow")
    with _keys_of(settings) as store:
        key, token = store.keys.create(
            tenant,
            name=name,
            region=region,
            doors=door or USUAL_DOORS,
            allowance=Allowance(per_minute, burst, concurrent),
            adapter=adapter,
            expires=_end(expires),
        )
    _print_json(_key_row(key) | {"key": token})
    _say("This is the only time that the key is shown: keep it well.", style="yellow")


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Print keys, without their secrets: one JSON object a line, oldest first."""
    with _kept(database) as store:
        for key in store.keys.list(tenant):
            _print_json(_key_row(key))


@keys_app.command("rotate")
def rotate_key(
    identity: KeyArgument,
    grace: Annotated[str, typer.Option(metavar="TIME", help="How long the old secret is still taken: 1d, 0s.")] = "1d",
    database: DatabaseOption = None,
) -> None:
    """Give a key a new secret, and print it: it cannot be shown again."""
    with _kept(database) as store:
        key, token = store.keys.rotate(identity, grace=_duration(grace, "grace"))
    _print_json(_key_row(key) | {"key": token})
    _say("This is the only time that the key is shown: keep it well.", style="yellow")


@keys_app.command("revoke")
def revoke_key(identity: KeyArgument, database: DatabaseOption = None) -> None:
    """Take a key back, for good. Running gateways know within two seconds."""
    with _kept(database) as store:
        _print_json(_key_row(store.keys.revoke(identity)))


def _keys_of(settings: Settings) -> Store:
    """The store, made when there is none: keys come before the first gateway."""
    if settings.database_url == "sqlite://":
        raise InputError("keys need a database that is not in memory only", where=settings.called("database_url"))
    return _open_store(settings.model_copy(update={"keep_days": None}))


def _key_row(key: Key) -> dict[str, Any]:
    def told(time: datetime | None) -> str | None:
        return None if time is None else time.isoformat(timespec="seconds")

    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "region": key.region,
        "doors": sorted(key.doors),
        "per_minute": key.allowance.per_minute,
        "burst": key.allowance.burst,
        "concurrent": key.allowance.concurrent,
        "adapter": key.adapter,
        "good": key.is_good(datetime.now(UTC)),
        "created": told(key.created),
        "expires": told(key.expires),
        "rotated": told(key.rotated),
        "old_until": told(key.old_until),
        "revoked": told(key.revoked),
    }


def _duration(given: str, where: str) -> timedelta:
    match = _AGO.fullmatch(given)
    if match is None:
        raise InputError("expected a number and s, m, h, d or w, as 1d", where=where)
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _end(given: str | None) -> datetime | None:
    """A time to come, or in how long: ``90d``."""
    if given is None:
        return None
    try:
        if _AGO.fullmatch(given):
            return datetime.now(UTC) + _duration(given, "expires")
        return datetime.fromisoformat(given).astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError("expected in how long, as 90d, or a time, as 2027-01-01T08:00Z", where="expires") from None


# --- policies -----------------------------------------------------------------------------------------------------

PolicyArgument = Annotated[str, typer.Argument(metavar="FILE", help="A policy file, or the name of a preset.")]


@policy_app.command("check")
def check_policies(
    policies: Annotated[list[str], typer.Argument(metavar="FILE...", help="Policy files, or names of presets.")],
) -> None:
    """Read policy files: one line for each, or the place of its first error. Exit code 0: all good, 2: one is not."""
    from tidegate.errors import PolicyError
    from tidegate.policy import load_policy

    wrong = False
    for name in policies:
        try:
            policy = load_policy(name)
        except PolicyError as error:
            wrong = True
            _say(f"tidegate: {error}", style="red")
            continue
        observed = sum(rule.observe for rule in policy.all_rules)
        row = {
            "file": name,
            "name": policy.name,
            "version": policy.version,
            "rules": len(policy.all_rules),
            "layers": [layer.name for layer in policy.layers],
            "observed": len(policy.all_rules) if policy.observe else observed,
            "needs": ["TIDEGATE_CONFIRM_GUARD"] if policy.confirms else [],
        }
        if policy.confirms and read_settings().confirm_guard is None:
            needs = "confirm needs TIDEGATE_CONFIRM_GUARD, which is not set here"
            _say(f"{name}: {needs}: a gateway without it does not take this policy", style="yellow")
        _print_json(row)
    if wrong:
        raise typer.Exit(WRONG)


@policy_app.command("explain")
def explain_policy(
    policy: PolicyArgument,
    severity: Annotated[str | None, typer.Option(help="What the guard says: safe, controversial or unsafe.")] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=P]", help="A category that it names, with its probability if any; repeatable."),
    ] = None,
    unsafe: Annotated[float | None, typer.Option(min=0, max=1, help="Its probability of unsafe.")] = None,
    flagged: Annotated[
        float | None, typer.Option(min=0, max=1, help="Its probability of controversial and unsafe together.")
    ] = None,
    target: Annotated[str, typer.Option(help="What was judged: prompt or response.")] = "prompt",
    failure: Annotated[
        str | None, typer.Option(metavar="KIND", help="The guard could not judge, as timeout; no --severity then.")
    ] = None,
    decision: Annotated[
        str | None, typer.Option(metavar="ID", help="A kept decision, with its verdict and scope, instead.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="For whom.")] = None,
    region: Annotated[str | None, typer.Option(help="For whom.")] = None,
    route: Annotated[str | None, typer.Option(help="For whom.")] = None,
    language: Annotated[str | None, typer.Option(help="For whom.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Say which rule of a policy wins for a verdict and a scope, and why each other one does not."""
    from tidegate.policy import explain, load_policy

    chosen = load_policy(policy)
    if sum(given is not None for given in (severity, failure, decision)) != 1:
        raise InputError("expected one of --severity, --failure and --decision")
    scope = Scope(tenant, region, route, language)
    if decision is not None:
        said, scope = _kept_verdict(decision, database)
    elif failure is not None:
        said = GuardFailure(_failure_kind(failure), "as given on the command line")
    else:
        known = (*CATEGORIES, *chosen.custom_categories)
        said = _verdict_of(severity or "", category or [], known, unsafe, flagged, target)
    told = explain(chosen, said, scope)
    _print_json(told.as_json()) if as_json else _print_explanation(told)


def _failure_kind(given: str) -> str:
    """The kind of a failure, which may be said with the word that policies have for it."""
    from tidegate.policy import FAILURE_KINDS

    named = {word: kind for kind, word in FAILURE_KINDS.items()} | {"default": GuardError.__name__}
    if given not in FAILURE_KINDS and given not in named:
        raise InputError(f"unknown kind {given!r}: expected one of {', '.join(named)}", where="failure")
    return named.get(given, given)


def _kept_verdict(identity: str, database: str | None) -> tuple[Verdict | GuardFailure, Scope]:
    kept = _kept_decision(identity, database)
    said = kept.decision.verdict or kept.decision.failure
    assert said is not None, "a decision has either a verdict or a failure"
    return said, kept.decision.scope


def _verdict_of(
    severity: str,
    categories: Sequence[str],
    known: Sequence[str],
    unsafe: float | None,
    flagged: float | None,
    target: str,
) -> Verdict:
    """A verdict as it is given on the command line; probabilities that are left out fit the severity."""
    try:
        level, judged = Severity.parse(severity), Target(target)
    except ValueError as error:
        raise InputError(str(error)) from None
    likely = 0.9 if level is Severity.UNSAFE else 0.05
    most = max(likely if flagged is None else flagged, 0.0 if unsafe is None else unsafe)
    if flagged is None and level is not Severity.SAFE:
        most = max(most, 0.95)
    least = min(likely if unsafe is None else unsafe, most)
    if flagged is not None and flagged < least:
        raise InputError(
            "a text that is unsafe is also flagged: expected a probability that is no less", where="flagged"
        )
    named: list[str] = []
    shares: dict[str, float] = {}
    for given in categories:
        name, equals, share = given.rpartition("=")
        if not equals:
            named.append(given)
            continue
        try:
            shares[name] = float(share)
        except ValueError:
            raise InputError(f"expected a probability after the =, got {share!r}", where="category") from None
        if not 0 <= shares[name] <= 1:
            raise InputError(f"expected a probability from 0 to 1, got {share!r}", where="category")
        named.append(name)
    if unknown := [name for name in named if name not in known]:
        raise InputError(f"unknown category {unknown[0]!r}: expected one of {', '.join(known)}", where="category")
    return Verdict(judged, level, Probabilities(1 - most, most - least, least), tuple(named), shares, guard="given")


def _print_explanation(told: Explanation) -> None:
    console = Console(highlight=False, soft_wrap=True)
    one = told.decision
    console.print(Text(one.action.word.upper(), style=_STYLES[one.action]).append(f"  {one.rule}", style="default"))
    console.print(f"  {told.because}")
    if one.observed is not None:
        console.print(f"  with all that is only observed: {one.observed.action.word} by {one.observed.rule}")
    console.print(Text("layers", style="bold"))
    console.print(f"  {' < '.join(told.layers)}")
    if told.categories:
        console.print(Text("categories", style="bold"))
    for name, there, why in told.categories:
        console.print(
            Text(f"  {'present' if there else 'not present':<12}", style="dim").append(name).append(f": {why}")
        )
    if told.tried:
        console.print(Text("rules, in the order in which they were tried", style="bold"))
    for each in told.tried:
        mark = "observed" if each.matched and each.observed else "matches" if each.matched else "no"
        where = f" ({each.layer})" if each.layer != "default" else ""
        of = f"{each.category}: " if each.category else ""
        console.print(
            Text(f"  {mark:<9}", style="green" if mark == "matches" else "dim").append(
                f"{of}{each.rule}{where}: {each.why}"
            )
        )
    console.print(Text("what holds", style="bold"))
    width = max(len(setting.name) for setting in told.settings) + 2
    for setting in told.settings:
        words = _visible(" ".join(setting.value.split()))
        console.print(
            Text(f"  {setting.name:<{width}}", style="dim").append(words).append(f"  [{setting.layer}]", "dim")
        )


@policy_app.command("replay")
def replay_policy(
    candidate: PolicyArgument,
    since: Annotated[str, typer.Option(metavar="TIME", help="From then on: 7d, 12h, 2026-11-21T08:00Z.")] = "7d",
    until: Annotated[str | None, typer.Option(metavar="TIME", help="From before then.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FILE", help="Compare with this policy, not with what was done.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, max=1000, help="Examples for each kind of change.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Decide kept decisions again with a candidate policy, and show what it would change. No guard is asked."""
    from tidegate.policy import Replay, load_policy

    replay = Replay(
        load_policy(candidate), against=None if against is None else load_policy(against), most_examples=examples
    )
    with _kept(database) as store:
        for kept in store.history(since=_time(since, "since"), until=_time(until, "until")):
            replay.add(kept.id, kept.decision)
    _print_json(replay.as_json()) if as_json else _print_replay(replay)


def _print_replay(replay: Replay) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{replay.decisions:,} decisions, {replay.changed:,} would change: "
        f"{replay.stricter:,} to stricter, {replay.milder:,} to milder"
    )
    notes = [
        (replay.observed, "would also change if all that the candidate only observes were in force"),
        (replay.failures, "have no verdict: the candidate's word on failures was taken"),
        (replay.estimates, "are from streams: a stricter candidate might have stopped them earlier"),
    ]
    for count, note in notes:
        if count:
            _say(f"{count:,} {note}")
    if not replay.changed:
        return
    table = Table("before", "after", "decisions", box=None, pad_edge=False, header_style="bold")
    for (before, after), number in sorted(replay.actions.items(), key=lambda one: -one[1]):
        if before is not after:
            table.add_row(Text(before.word, _STYLES[before]), Text(after.word, _STYLES[after]), f"{number:,}")
    console.print(table)
    rules = Table("rule before", "rule after", "decisions", box=None, pad_edge=False, header_style="bold")
    for (old, new), number in replay.rules.most_common(20):
        rules.add_row(old, new, f"{number:,}")
    console.print(rules)
    for change in replay.examples:
        verdict, failure = change.before.verdict, change.before.failure
        said = f"{verdict.severity.word} {', '.join(verdict.categories)}".strip() if verdict else ""
        words = said or (failure.kind if failure else "")
        console.print(
            Text(change.identity, "dim").append(
                f"  {change.before.action.word} ({change.before.rule}) -> "
                f"{change.after.action.word} ({change.after.rule})  {words}",
                style="not dim",
            )
        )


# --- measure, train, export ---------------------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    benchmark: Annotated[list[Path], typer.Option("--benchmark", help="Examples, .jsonl or .jsonl.gz; repeatable.")],
    guard: GuardOption = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write all figures here.")] = None,
) -> None:
    """Measure a guard on labelled examples: strict and loose F1, precision, recall, AUROC."""
    from tidegate.evals.run import evaluate as measure

    for path in benchmark:
        if not path.is_file():
            raise InputError("there is no such file", where=str(path))
    judge = _load_guard(read_settings(guard=guard))
    with _bar("judging") as progress:
        task = progress.add_task("judging", total=None)

        def moved(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        figures = asyncio.run(_measured(judge, measure(judge, benchmark, moved)))
    if json_out is not None:
        _write(json_out, json.dumps(figures, ensure_ascii=False, indent=2) + "\n")
    console = Console(highlight=False)
    console.print(f"{figures['guard']}: {figures['rows']:,} rows, {figures['not_judged']:,} not judged")
    console.print(_scores_table(figures))


async def _measured(guard: StreamGuard, figures: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await figures
    finally:
        await guard.close()


_FIGURES: Final = (("F1", "f1"), ("precis.", "precision"), ("recall", "recall"), ("FPR", "false_positive_rate"))


def _scores_table(figures: dict[str, Any]) -> Table:
    """Strict beside loose, one row for each group; strict counts Controversial as unsafe, loose as safe.

    It fits into 80 columns: all columns of figures keep their width, and a long name goes on in the next line.
    """
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=12)
    for name in ("rows", *(name for name, _ in _FIGURES), "AUROC", "loose\nF1", "loose\nFPR", "loose\nAUROC"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("all", *_scores(figures["overall"]), style="bold")
    for kind, groups in figures["by"].items():
        table.add_section()
        table.add_row(f"by {kind.replace('_', ' and ')}", style="dim")
        for name, group in groups.items():
            table.add_row(f"  {name or 'not known'}", *_scores(group))
    return table


def _scores(group: dict[str, Any]) -> list[str]:
    strict, loose = group["strict"], group["loose"]
    shown = [strict[key] for _, key in _FIGURES]
    shown += [strict["auroc"], loose["f1"], loose["false_positive_rate"], loose["auroc"]]
    return [f"{strict['rows']:,}", *("–" if figure is None else f"{figure:.3f}" for figure in shown)]


@train_app.command("edge")
def train_edge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, as recipes/edge.yaml.")],
    data: Annotated[Path, typer.Option(help="Folder of examples (*.jsonl, *.jsonl.gz) with train and dev splits.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/<name of the recipe>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on with the run in the folder.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model: a minute, then faster.")] = False,
) -> None:
    """Train the edge guard. It may be interrupted; the same command goes on."""
    train = _from_extra("train", "tidegate.train.edge", "train")
    run = out or Path("runs") / recipe.stem
    with _bar("training", "{task.fields[line]}") as progress:
        task = progress.add_task("training", total=None, line="")

        def moved(done: int, total: int, line: str) -> None:
            progress.update(task, completed=done, total=total, line=line)

        figures = train(
            recipe,
            run,
            data=data,
            progress=moved,
            resume=resume,
            threads=threads,
            compiled=compiled,
            device=device,
        )
    _say(f"trained: {run}")
    _print_json(figures)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a checkpoint.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="An edge guard, as one ONNX file with 8-bit weights.")] = False,
    precision: Annotated[
        str | None, typer.Option(help="A Stream or Gen checkpoint, as fp32, int8, int8-fast or int4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="RUN/onnx")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --onnx, a folder of examples: compare and calibrate on their dev split.")
    ] = None,
) -> None:
    """Turn a checkpoint into what load_guard reads on any CPU: ONNX."""
    if onnx == (precision is not None):
        raise InputError("expected --onnx for an edge guard, or --precision for a Stream or Gen checkpoint")
    folder = out or run / "onnx"
    if precision is not None:
        if data is not None:
            raise InputError("--data is for edge guards")
        figures = _from_extra("train", "tidegate.train.export_backbone", "export_backbone")(
            run, folder, precision=precision
        )
    elif data is None:
        figures = _from_extra("train", "tidegate.train.export", "export_onnx")(run, folder)
    else:
        figures = _calibrated(run, folder, data)
    _say(f"exported: {folder} (try it with --guard {figures.get('kind', 'edge')}:{folder})")
    _print_json(figures)


def _calibrated(run: Path, folder: Path, data: Path) -> Any:
    finish = _from_extra("train", "tidegate.train.calibrate", "finish_guard")
    with _bar("calibrating") as progress:
        task = progress.add_task("calibrating", total=None)

        def moved(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return finish(run, folder, data, progress=moved)


def _from_extra(extra: str, module: str, name: str, *, asked: str = "this") -> Any:
    """Something of a module that an extra is for; ``asked`` is what asked for it, for the error when it is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tidegate"):
            raise
        raise InputError(f"{asked} needs {error.name}: pip install 'tidegate[{extra}]'") from None


@app.command()
def guards() -> None:
    """List the guards of this installation, and whether they can be loaded."""
    from tidegate.guards import list_guards

    console = Console(highlight=False)
    rows = list_guards()
    table = Table("guard", "what it is", "size", "here", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        size = f"{row.bytes / 1e6:.1f} MB" if row.bytes else "–"
        table.add_row(row.spec, row.description, size, Text("yes", "green") if row.available else Text("no", "yellow"))
    console.print(table)
    for row in rows:
        if row.languages:
            console.print(f"{row.spec} was trained on: {' '.join(row.languages)}", soft_wrap=True)
        if not row.available:
            _say(f"{row.spec} cannot be loaded: {row.why_not}", style="yellow")


# --- saying things ------------------------------------------------------------------------------------------------

_STYLES: Final = {
    Action.ALLOW: "bold green",
    Action.WARN: "bold yellow",
    Action.REVIEW: "bold yellow",
    Action.REDACT: "bold red",
    Action.BLOCK: "bold red",
}


def _say(words: str, style: str | None = None) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(words, style=style or ""))


def _tell(words: str, form: LogFormat, level: int = logging.INFO) -> None:
    """Say it as a server does: for people, or as a line of its JSON log."""
    from tidegate.gateway.logs import log_line

    if form == "json":
        sys.stderr.write(log_line(words, level) + "\n")
        sys.stderr.flush()
    else:
        _say(words, style={logging.WARNING: "yellow", logging.ERROR: "red"}.get(level))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _bar(what: str, *more: str) -> Progress:
    """A progress bar on stderr; silent where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *map(TextColumn, more))
    return Progress(*columns, console=console, disable=not console.is_terminal)
