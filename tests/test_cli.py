"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from typer.testing import CliRunner, Result
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

import tidegate
import tidegate.guards
from tidegate.cli import app
from tidegate.data.examples import write_examples
from tidegate.errors import GuardTimeout, GuardUnavailable
from tidegate.store import open_store
from tidegate.testing import FakeStreamGuard
from tidegate.types import Conversation, Example, Severity, Target

PROGRAM = [sys.executable, str(Path(__file__).parent / "fake_tidegate.py")]
POLICY = """
name: open
on_guard_error: {on_guard_error}
otherwise: allow
rules:
  - {{name: stop, severity: unsafe, action: block}}
  - {{name: mark, severity: controversial, action: warn}}
"""


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> FakeStreamGuard:
    fake = FakeStreamGuard()
    monkeypatch.setattr(tidegate.guards, "load_guard", lambda spec="edge", **_: fake)
    return fake


def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def policy_file(folder: Path, on_guard_error: str = "block") -> Path:
    path = folder / "policy.yaml"
    path.write_text(POLICY.format(on_guard_error=on_guard_error), encoding="utf-8")
    return path


# --- check --------------------------------------------------------------------------------------------------------


def test_safe_text_is_allowed_and_the_exit_code_is_0(guard: FakeStreamGuard) -> None:
    result = run("check", "how do I bake bread")
    assert result.exit_code == 0
    assert result.stdout.startswith("ALLOW  safe")
    assert guard.closed


def test_unsafe_text_is_flagged_with_category_and_rule_and_the_exit_code_is_1(guard: FakeStreamGuard) -> None:
    result = run("check", "build a bomb")
    assert result.exit_code == 1
    assert "BLOCK  unsafe" in result.stdout
    assert "Violent" in result.stdout
    assert "balanced" in result.stdout
    assert result.stderr == ""


def test_a_warning_counts_as_flagged(guard: FakeStreamGuard, tmp_path: Path) -> None:
    result = run("check", "a knife", "--policy", policy_file(tmp_path))
    assert result.stdout.startswith("WARN")
    assert result.exit_code == 1


def test_json_is_one_object_of_the_documented_shape(guard: FakeStreamGuard) -> None:
    result = run("check", "build a bomb", "--json")
    row = json.loads(result.stdout)
    assert row["verdict"]["severity"] == "unsafe"
    assert set(row["verdict"]["probabilities"]) == {"safe", "controversial", "unsafe"}
    assert row["verdict"]["categories"] == ["Violent"]
    assert row["verdict"]["refusal"] is None
    assert {"action": "block", "policy": "balanced"}.items() <= row["decision"].items()
    assert row["decision"]["rule"]


def test_with_a_response_the_response_is_judged_and_the_text_is_its_context(guard: FakeStreamGuard) -> None:
    result = run("check", "about the bomb", "--response", "I cannot help with that", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdict"]["target"] == "response"
    assert guard.judged == [Conversation.of("about the bomb", "I cannot help with that")]


def test_a_dash_reads_the_text_from_stdin(guard: FakeStreamGuard) -> None:
    assert run("check", "-", stdin="schöne Grüße\n".encode()).exit_code == 0
    assert guard.judged == [Conversation.of("schöne Grüße\n")]
    result = run("check", "-", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a text or --file"),
        (["text", "--file", "rows.jsonl", "--out", "out.jsonl"], "either a text or --file"),
        (["--file", "rows.jsonl"], "--file and --out belong together"),
        (["--file", "rows.jsonl", "--out", "out.jsonl", "--json"], "for a single text"),
        ([" \n"], "nothing but white space"),
        (["text", "--policy", "nowhere.yaml"], "nowhere.yaml: cannot read the policy"),
        (["--file", "nowhere.jsonl", "--out", "out.jsonl"], "nowhere.jsonl: cannot be read: No such file"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(
    guard: FakeStreamGuard, arguments: Sequence[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_misspelt_setting_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_POLICI", "strict")
    result = run("check", "text")
    assert result.exit_code == 2
    assert "TIDEGATE_POLICI" in result.stderr


def test_unknown_guards_are_refused() -> None:
    result = run("check", "text", "--guard", "crystal-ball")
    assert result.exit_code == 2
    assert "unknown guard 'crystal-ball'" in result.stderr


@pytest.mark.parametrize(("on_guard_error", "code"), [("allow", 0), ("review", 1), ("block", 1)])
def test_a_guard_that_fails_is_decided_by_the_policy(
    guard: FakeStreamGuard, tmp_path: Path, on_guard_error: str, code: int
) -> None:
    guard.error = GuardTimeout("too slow today")
    result = run("check", "guardfail", "--json", "--policy", policy_file(tmp_path, on_guard_error))
    row = json.loads(result.stdout)
    assert result.exit_code == code
    assert row["verdict"] is None
    assert row["failure"]["message"] == "too slow today"
    assert row["decision"]["rule"] == "on_guard_error"


def test_a_guard_that_is_not_there_is_exit_code_2_whatever_the_policy_says(
    guard: FakeStreamGuard, tmp_path: Path
) -> None:
    guard.error = GuardUnavailable("it left")
    result = run("check", "guardfail", "--policy", policy_file(tmp_path, "allow"))
    assert result.exit_code == 2
    assert "it left" in result.stderr


def test_colours_appear_on_no_pipe(guard: FakeStreamGuard) -> None:
    assert "\x1b" not in run("check", "build a bomb").output


# --- check --file -------------------------------------------------------------------------------------------------


def test_a_file_is_judged_row_by_row_and_bad_lines_make_exit_code_2(guard: FakeStreamGuard, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        json.dumps({"id": "a", "messages": [{"role": "user", "content": "bread"}]}),
        "{broken",
        json.dumps({"id": "b", "messages": [{"role": "user", "content": "bomb"}]}),
    ]
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = run("check", "--file", source, "--out", out)
    assert result.exit_code == 2
    assert f"{source}:2: not JSON" in result.stderr
    assert "2 checked, 1 flagged, 1 bad lines set apart" in result.stderr
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(("words", "code"), [("bread", 0), ("bomb", 1)])
def test_a_file_without_bad_lines_says_by_its_exit_code_whether_anything_was_flagged(
    guard: FakeStreamGuard, tmp_path: Path, words: str, code: int
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": words}]}), encoding="utf-8")
    assert run("check", "--file", source, "--out", tmp_path / "out.jsonl").exit_code == code
    again = run("check", "--file", source, "--out", tmp_path / "out.jsonl")
    assert again.exit_code == code
    assert "1 of them by an earlier run" in again.stderr


# --- watch --------------------------------------------------------------------------------------------------------


@contextmanager
def started(
    *arguments: str, stdin: int = subprocess.PIPE, settings: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    environment |= settings or {}
    pipe = subprocess.PIPE
    with subprocess.Popen([*PROGRAM, *arguments], stdin=stdin, stdout=pipe, stderr=pipe, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def watched(data: bytes, *arguments: str) -> tuple[int, bytes, str]:
    with started("watch", *arguments) as process:
        out, err = process.communicate(data, timeout=60)
    return process.returncode, out, err.decode()


def test_safe_text_passes_watch_byte_for_byte() -> None:
    text = "Grüße, 早上好,\n\n  👋🏽 ok \n".encode()
    code, out, err = watched(text)
    assert (code, out) == (0, text)
    assert err.startswith("ALLOW: passed")


def test_watch_stops_at_a_block_while_the_writer_still_writes() -> None:
    with started("watch") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("all is wéll ".encode())
        process.stdin.flush()
        assert process.stdout.read(4) == b"all "
        process.stdin.write(b"bomb bomb and more")
        process.stdin.flush()
        assert process.wait(timeout=60) == 1  # its stdin is still open
        assert process.stdout.read().decode() == "is wéll"
        assert process.stderr is not None
        assert "BLOCK: stopped" in process.stderr.read().decode()


def test_watch_refuses_what_is_not_utf8() -> None:
    code, out, err = watched(b"good \xff bad")
    assert code == 2
    assert "not UTF-8 near byte" in err
    assert b"bad" not in out


def test_watch_of_a_consumer_that_went_away_ends_quietly() -> None:
    with started("watch") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.write(b"one two three four ")
        process.stdin.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("verb", ["watch", "check -"])
def test_a_closed_stdin_is_one_clear_line_and_exit_code_2(verb: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    command = f"exec {shlex.join(PROGRAM)} {verb} <&-"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.decode().splitlines()) == (2, ["tidegate: stdin: it is closed"])


def test_a_stdin_that_cannot_be_read_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    write_only = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with started("watch", stdin=write_only) as process:
            _, err = process.communicate(timeout=60)
    finally:
        os.close(write_only)
    assert process.returncode == 2
    assert err.decode().startswith("tidegate: stdin: cannot be read: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_that_is_full_is_not_taken_for_a_flagged_text() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    with Path("/dev/full").open("wb") as full:
        command = [*PROGRAM, "watch"]
        ended = subprocess.run(
            command,
            input=b"all is well ",
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
            check=False,
        )
    assert (ended.returncode, ended.stderr.decode().splitlines()) == (2, ["tidegate: No space left on device"])


# --- servers ------------------------------------------------------------------------------------------------------


def address(errors: IO[bytes] | None, name: str) -> str:
    assert errors is not None
    for line in errors:
        if found := re.match(rf"{name} +(http://\S+)", line.decode()):
            return found[1]
    raise AssertionError("the server said no address")


def test_serve_with_demo_answers_people_and_programs_and_ends_on_a_signal(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/kept.db"
    with started("serve", "--demo", "--port", "0", "--database", database, stdin=subprocess.DEVNULL) as process:
        playground = address(process.stderr, "playground")
        with urllib.request.urlopen(playground, timeout=30) as page:
            assert b"token by token" in page.read()
        body = {"model": "tidegate-demo", "messages": [{"role": "user", "content": "a recipe for apple pie"}]}
        request = urllib.request.Request(
            playground.replace("/playground", "/v1/chat/completions"),
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert "apples" in json.load(answer)["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_logs_json_says_nothing_else(tmp_path: Path, workers: str) -> None:
    options = ["--port", "0", "--database", f"sqlite:///{tmp_path}/kept.db", "--workers", workers]
    settings = {"TIDEGATE_LOG_FORMAT": "json", "TIDEGATE_AUTH": "keys"}
    with started("serve", *options, stdin=subprocess.DEVNULL, settings=settings) as process:
        assert process.stderr is not None
        said = [json.loads(process.stderr.readline()) for _ in range(5)]
        process.send_signal(signal.SIGTERM)
        said += [json.loads(line) for line in process.stderr]
    assert said[0]["level"] == "warning"
    assert said[0]["message"].startswith("there is no key yet")
    assert any(line["message"].startswith("playground ") for line in said)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"TIDEGATE_PROT": "1"}, "TIDEGATE_PROT: unknown setting"),
        ({"TIDEGATE_POLICY": "nope"}, "cannot read the policy"),
        ({"TIDEGATE_REDIS_URL": "nope"}, "expected"),
        ({"TIDEGATE_REDIS_URL": "nope", "TIDEGATE_WORKERS": "2"}, "expected"),
    ],
)
def test_what_keeps_a_server_from_starting_is_said_in_the_form_of_its_log(
    settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    settings = {"TIDEGATE_DATABASE_URL": f"sqlite:///{tmp_path}/kept.db", **settings, "TIDEGATE_LOG_FORMAT": "json"}
    with started("serve", "--port", "0", stdin=subprocess.DEVNULL, settings=settings) as process:
        _, errors = process.communicate(timeout=60)
    said = [json.loads(line) for line in errors.splitlines()]
    assert process.returncode == 2
    assert any(line["level"] == "error" and words in line["message"] for line in said)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TIDEGATE_REDIS_URL", "nope", "expected an address of a Redis"),
        ("TIDEGATE_DATABASE_URL", "mysql://x", "the database 'mysql' is not supported"),
        ("TIDEGATE_DATABASE_URL", "sqlite:///x.db?mode=ro", "takes no ?options"),
        ("TIDEGATE_WEBHOOKS", "nope.yaml", "nope.yaml: cannot read the file"),
        ("TIDEGATE_GUARD", "nope:x", "unknown guard 'nope:x'"),
        ("TIDEGATE_GUARD", "remote:nope", "nope: cannot read the file"),
        ("TIDEGATE_GUARD", "edge:nope", "nope lacks model.onnx"),
        ("TIDEGATE_ADAPTERS", "a=b", "only gen: guards take adapters"),
        ("TIDEGATE_TLS_CERT", __file__, "cannot be used"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    for name, other in {"TIDEGATE_DATABASE_URL": "sqlite://", variable: value}.items():
        monkeypatch.setenv(name, other)
    result = run("serve", "--port", "0")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"tidegate: {variable}: ")
    assert words in result.stderr.replace("\n", " ")


def test_what_is_wrong_with_an_option_is_said_with_the_name_of_the_option() -> None:
    assert run("check", "hello", "--guard", "nope:x").stderr.startswith("tidegate: guard: unknown guard 'nope:x'")


def test_traces_without_their_extra_say_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_TRACES", "otlp")
    monkeypatch.delitem(sys.modules, "tidegate.gateway.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    result = run("serve", "--port", "0", "--database", "sqlite://")
    assert result.exit_code == 2
    assert result.stderr.startswith("tidegate: TIDEGATE_TRACES: otlp needs opentelemetry: pip install 'tidegate[otel]'")


def test_a_confirming_guard_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_CONFIRM_GUARD", "nope:x")
    result = run("serve", "--port", "0", "--database", "sqlite://")
    assert result.exit_code == 2
    assert "TIDEGATE_CONFIRM_GUARD: unknown guard 'nope:x': expected " in result.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_policy_with_confirm_needs_a_guard_that_confirms(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("name: p\non_guard_error: block\notherwise: allow\nrules: []\nconfirm: true\n")
    options = ["--port", "0", "--database", f"sqlite:///{tmp_path}/kept.db", "--workers", workers]
    result = run("serve", *options, "--policy", path)
    assert result.exit_code == 2
    assert f"{path}: confirm: no guard is there to confirm alarms" in result.stderr.replace("\n", "")


@pytest.mark.parametrize(("guard", "code", "words"), [(None, 0, "as confirm.on_error says, pass"), ("edge", 1, "")])
def test_watch_has_alarms_confirmed_where_the_policy_says_so(
    tmp_path: Path, guard: str | None, code: int, words: str
) -> None:
    path = tmp_path / "policy.yaml"
    rule = "{name: all, severity: unsafe, action: block}"
    lines = f"name: p\non_guard_error: block\notherwise: allow\nrules: [{rule}]\nconfirm: {{on_error: pass}}\n"
    path.write_text(lines)
    with started("watch", "--policy", str(path), settings={"TIDEGATE_CONFIRM_GUARD": guard or ""}) as process:
        _, said = process.communicate(b"a bomb bomb shelter is here", timeout=60)
    assert process.returncode == code
    assert words in said.decode()
    assert (b"TIDEGATE_CONFIRM_GUARD is not set" in said) is (guard is None)


async def test_serve_lets_live_streams_end_when_it_is_told_to_stop() -> None:
    with started("serve", "--port", "0", "--database", "sqlite://", stdin=subprocess.DEVNULL) as process:
        url = address(process.stderr, "OpenAI API").replace("http://", "ws://")
        async with connect(f"{url}/live", subprotocols=[Subprotocol("tidegate.live.v1")]) as live:
            assert json.loads(await live.recv())["type"] == "hello"
            for frame in ({"type": "open"}, {"type": "text", "text": "Let the dough rest, "}):
                await live.send(json.dumps({**frame, "stream": 1}))
                await live.recv()
            process.send_signal(signal.SIGTERM)
            assert json.loads(await live.recv())["type"] == "going_away"
            for frame in ({"type": "text", "text": "then bake it."}, {"type": "finish"}):
                await live.send(json.dumps({**frame, "stream": 1}))
            frames = [json.loads(frame) async for frame in live]
            extensions, code = live.protocol.extensions, live.close_code
        assert process.wait(timeout=60) == -signal.SIGTERM

    assert (frames[-1]["reason"], frames[-1]["released"], code) == ("finished", 33, 1001)
    assert extensions == []


@pytest.mark.parametrize(("level", "logged"), [("info", True), ("error", False)])
def test_the_log_level_governs_what_the_gateway_says_and_no_text_is_in_it(level: str, logged: bool) -> None:
    arguments = ("serve", "--port", "0", "--database", "sqlite://", "--upstream", "http://127.0.0.1:9/v1")
    settings = {"TIDEGATE_LOG_LEVEL": level}
    with started(*arguments, stdin=subprocess.DEVNULL, settings=settings) as process:
        url = address(process.stderr, "OpenAI API")
        body = {"model": "m", "messages": [{"role": "user", "content": "canary7"}]}
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        caught.value.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    said = b"exchange failed: UpstreamError: the upstream cannot be reached (connection refused)"
    assert (said in errors) is logged
    assert b"canary7" not in errors


def test_the_demo_upstream_says_that_it_is_a_demo() -> None:
    with started("demo-upstream", "--port", "0", stdin=subprocess.DEVNULL) as process:
        url = address(process.stderr, "OpenAI API")
        with urllib.request.urlopen(f"{url}/models", timeout=30) as models:
            assert json.load(models)["data"][0]["id"] == "tidegate-demo"
        assert process.stderr is not None
        assert b"no language model" in process.stderr.readline()


def test_a_taken_port_is_one_clear_line(guard: FakeStreamGuard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port), "--database", "sqlite://")
    assert result.exit_code == 2
    where = "TIDEGATE_HOST and port"
    assert result.stderr == (f"tidegate: {where}: cannot listen on 127.0.0.1:{port}: Address already in use\n")


def test_a_server_without_an_upstream_says_that_models_cannot_be_asked(tmp_path: Path) -> None:
    arguments = ("serve", "--port", "0", "--database", f"sqlite:///{tmp_path}/kept.db")
    with started(*arguments, stdin=subprocess.DEVNULL) as process:
        address(process.stderr, "health")
        assert process.stderr is not None
        assert b"There is no upstream" in process.stderr.readline()
        process.send_signal(signal.SIGINT)


def test_demo_and_upstream_exclude_each_other(guard: FakeStreamGuard) -> None:
    result = run("serve", "--demo", "--upstream", "http://127.0.0.1:1/v1")
    assert result.exit_code == 2
    assert "leave --upstream out" in result.stderr


# --- eval, train, export, guards ----------------------------------------------------------------------------------


def test_eval_prints_a_table_and_writes_all_figures(guard: FakeStreamGuard, tmp_path: Path) -> None:
    benchmark, out = tmp_path / "bench.jsonl", tmp_path / "figures.json"
    texts = [("bomb", Severity.UNSAFE), ("bread", Severity.SAFE), ("knife", Severity.CONTROVERSIAL)]
    write_examples(
        benchmark,
        [
            Example(str(n), Conversation.of(text), Target.PROMPT, severity, language="en", source="ours")
            for n, (text, severity) in enumerate(texts)
        ],
    )
    result = run("eval", "--benchmark", benchmark, "--json", out)
    assert result.exit_code == 0
    assert "fake/1: 3 rows, 0 not judged" in result.stdout
    assert "1.000" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    assert json.loads(out.read_text())["overall"]["strict"]["f1"] == 1.0


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/kept.db"
    open_store(database).close()
    out = str(tmp_path / "nowhere" / "out.jsonl")
    with started("decisions", "export", "--out", out, "--database", database) as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode()) == (2, f"tidegate: {out}: No such file or directory\n")


def test_eval_of_a_file_that_is_not_there_says_so(guard: FakeStreamGuard) -> None:
    result = run("eval", "--benchmark", "nowhere.jsonl")
    assert result.exit_code == 2
    assert "nowhere.jsonl: there is no such file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["train", "edge", "recipe.yaml", "--data", "data"], "tidegate.train.edge", "torch"),
        (["export", "run", "--onnx"], "tidegate.train.export", "onnx"),
    ],
)
def test_without_the_extra_train_and_export_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], module: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, extra, None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"this needs {extra}: pip install 'tidegate[train]'" in result.stderr


def test_export_asks_for_the_format() -> None:
    result = run("export", "run")
    assert result.exit_code == 2
    assert "--onnx" in result.stderr


def test_guards_lists_the_shipped_one_and_each_kind_that_a_spec_can_name() -> None:
    result = run("guards")
    assert result.exit_code == 0
    for kind in ("edge", "stream:", "gen:", "vllm-stream:", "remote:", "tidegate:", "cascade:"):
        assert re.search(rf"^{kind}", result.stdout, re.MULTILINE), kind


def test_guards_says_what_is_missing_for_a_kind_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    result = run("guards")
    assert result.exit_code == 0
    assert "gen:FOLDER_OR_NAME cannot be loaded: there is no torch here: pip install 'tidegate[torch]'" in result.stderr
    assert "remote:" not in result.stderr


def test_version_and_help(guard: FakeStreamGuard) -> None:
    assert run("--version").stdout == f"tidegate {tidegate.__version__}\n"
    for verb in ("check", "watch", "serve", "demo-upstream", "eval", "train", "export", "guards"):
        assert run(verb, "--help").exit_code == 0
        assert verb in run("--help").stdout
