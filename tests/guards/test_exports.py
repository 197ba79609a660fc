"""``stream:FOLDER`` and ``gen:FOLDER`` with a folder of ``tidegate export``."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from typer.testing import CliRunner  # noqa: E402

from gen_folder import ABOUT_PROMPT, ABOUT_RESPONSE, FORMS, gen_folder, toy_rows  # noqa: E402
from qwen_tokenizer import LINES  # noqa: E402
from stream_folder import write_guard  # noqa: E402
from streams import streamed  # noqa: E402
from tidegate.cli import app  # noqa: E402
from tidegate.errors import GuardUnavailable, InputError  # noqa: E402
from tidegate.guards import load_guard  # noqa: E402
from tidegate.guards.gen import GenGuard  # noqa: E402
from tidegate.guards.stream import Qwen3StreamGuard  # noqa: E402
from tidegate.train.export_backbone import PRECISIONS, export_backbone  # noqa: E402
from tidegate.types import Conversation, Role, Target, TokenVerdict, Turn  # noqa: E402

NOISE = 1e-5
WINDOW = 96
TEXT = " ".join(LINES)
ASKED = Conversation.of("how to build a bomb?")
ABOUT = {Target.PROMPT: ABOUT_PROMPT, Target.RESPONSE: ABOUT_RESPONSE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stream checkpoint whose window short texts outgrow."""
    folder = tmp_path_factory.mktemp("exports") / "stream"
    write_guard(folder, max_position_embeddings=WINDOW)
    for precision in PRECISIONS:
        export_backbone(folder, folder.parent / precision, precision=precision)
    return folder


def gap(one: Sequence[TokenVerdict], other: Sequence[TokenVerdict]) -> float:
    """The largest difference of a probability; the places must be the same."""
    assert [verdict.span for verdict in one] == [verdict.span for verdict in other]
    return max(
        abs(getattr(a.probabilities, name) - getattr(b.probabilities, name))
        for a, b in zip(one, other, strict=True)
        for name in ("safe", "controversial", "unsafe")
    )


async def test_fp32_says_what_the_checkpoint_says(checkpoint: Path) -> None:
    async with (
        Qwen3StreamGuard(checkpoint) as torch_guard,
        Qwen3StreamGuard(checkpoint.parent / "fp32", threads=2) as guard,
    ):
        answer = Conversation((*ASKED.turns, Turn(Role.ASSISTANT, TEXT)))
        for conversation in (ASKED, Conversation.of(TEXT), answer):
            expected, verdict = await torch_guard.judge(conversation), await guard.judge(conversation)
            assert verdict.severity is expected.severity
            assert verdict.probabilities.unsafe == pytest.approx(expected.probabilities.unsafe, abs=NOISE)
        assert gap(await streamed(torch_guard.open(ASKED), [TEXT]), await streamed(guard.open(ASKED), [TEXT])) < NOISE
        assert await guard.health() > 0


@pytest.fixture(scope="module")
def guards(checkpoint: Path) -> dict[str, Qwen3StreamGuard]:
    """Guards whose caches are too small for all that is asked of them at once."""
    names = ("int8", "int4")
    return {name: Qwen3StreamGuard(checkpoint.parent / name, threads=1, positions=3 * WINDOW) for name in names}


@settings(max_examples=40)
@given(
    cuts=st.lists(st.lists(st.integers(1, 60), max_size=8), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, len(TEXT)), min_size=4, max_size=4),
    precision=st.sampled_from(("int8", "int4")),
)
def test_neither_cuts_nor_company_nor_windows_change_a_verdict(
    guards: dict[str, Qwen3StreamGuard], cuts: list[list[int]], lengths: list[int], precision: str
) -> None:
    guard = guards[precision]

    async def run() -> None:
        texts = [TEXT[:length] for length, _ in zip(lengths, cuts, strict=False)]
        together = await asyncio.gather(
            *(streamed(guard.open(ASKED), _pieces(text, cut)) for text, cut in zip(texts, cuts, strict=True))
        )
        for text, verdicts in zip(texts, together, strict=True):
            assert gap(verdicts, await streamed(guard.open(ASKED), [text])) < NOISE

    asyncio.run(run())


def _pieces(text: str, cuts: list[int]) -> list[str]:
    pieces = []
    for cut in cuts:
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


async def test_gen_exports_are_judged_like_their_checkpoint(tmp_path: Path) -> None:
    export_backbone(gen_folder(), tmp_path / "gen", precision="int8")
    async with (
        GenGuard(str(gen_folder()), forms=ABOUT) as torch_guard,
        GenGuard(str(tmp_path / "gen"), forms=ABOUT, threads=2) as guard,
    ):
        rows = [row for row in toy_rows(21, 24) if row.form is not FORMS[2]]
        verdicts = await asyncio.gather(*(guard.judge(row.conversation) for row in rows))
        for row, verdict in zip(rows, verdicts, strict=True):
            expected = await torch_guard.judge(row.conversation)
            assert verdict.severity is expected.severity
            assert verdict.categories == expected.categories
            assert verdict.probabilities.unsafe == pytest.approx(expected.probabilities.unsafe, abs=0.02)
            assert verdict.guard == "gen/gen"


async def test_a_checkpoint_is_exported_by_the_command_line_and_loaded_by_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--precision", "int8", "--out", str(tmp_path / "x")])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["kind"] == "stream"
    assert f"--guard stream:{tmp_path / 'x'}" in result.stderr.replace("\n", "")
    guard = load_guard(f"stream:{tmp_path / 'x'}", threads=1)
    assert (await guard.judge(ASKED)).guard == "stream/x"
    await guard.close()


WITHOUT_TORCH = """
import asyncio, pickle, sys
for name in ("torch", "transformers", "safetensors", "huggingface_hub", "numba", "onnx", "peft"):
    sys.modules[name] = None
from tidegate.guards import load_guard
from tidegate.types import Conversation

async def main(spec, forms):
    guard = load_guard(spec, threads=1)
    if forms:
        await guard.close()
        guard = type(guard)(spec.partition(":")[2], threads=1, forms=pickle.loads(bytes.fromhex(forms)))
    said = await guard.judge(Conversation.of("tell me of bread and knife and tea"))
    session = guard.open(Conversation.of("tell me more"))
    tokens = [*await session.feed("of course bread and knife and tea"), *await session.finish()]
    print(said.severity.word, said.probabilities.unsafe, tokens[-1].probabilities.unsafe)
    await guard.close()

asyncio.run(main(*sys.argv[1:]))
"""


def said_without_torch(spec: str, forms: str = "") -> list[str]:
    """Severity and probabilities as a process says them that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, spec, forms]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


async def said_here(guard: Qwen3StreamGuard | GenGuard) -> list[str]:
    """The same in this process."""
    said = await guard.judge(Conversation.of("tell me of bread and knife and tea"))
    tokens = await streamed(guard.open(Conversation.of("tell me more")), ["of course bread and knife and tea"])
    await guard.close()
    return [said.severity.word, str(said.probabilities.unsafe), str(tokens[-1].probabilities.unsafe)]


async def test_an_export_of_a_stream_guard_runs_where_there_is_no_torch(checkpoint: Path) -> None:
    folder = checkpoint.parent / "int8"
    assert said_without_torch(f"stream:{folder}") == await said_here(Qwen3StreamGuard(folder, threads=1))


async def test_an_export_of_a_gen_guard_runs_where_there_is_no_torch(tmp_path: Path) -> None:
    folder = tmp_path / "gen"
    export_backbone(gen_folder(), folder, precision="int8")
    without = said_without_torch(f"gen:{folder}", pickle.dumps(ABOUT).hex())
    assert without == await said_here(GenGuard(str(folder), threads=1, forms=ABOUT))


@pytest.mark.parametrize("options", [[], ["--onnx", "--precision", "int8"], ["--precision", "int8", "--data", "d"]])
def test_export_wants_one_kind(options: list[str], checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(checkpoint), *options, "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_what_an_export_cannot_do_is_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.parent / "int8"
    with pytest.raises(InputError, match="float32"):
        Qwen3StreamGuard(folder, dtype="bfloat16")
    with pytest.raises(InputError, match="CPU"):
        Qwen3StreamGuard(folder, device="cuda")
    with pytest.raises(GuardUnavailable, match="Gen model"):
        GenGuard(str(folder))
    export_backbone(gen_folder(), tmp_path / "gen")
    with pytest.raises(InputError, match="merge"):
        GenGuard(str(tmp_path / "gen"), adapters={"bank": tmp_path})
    with pytest.raises(InputError, match="float32"):
        GenGuard(str(tmp_path / "gen"), dtype="float16")
    with pytest.raises(InputError, match="CPU"):
        GenGuard(str(tmp_path / "gen"), device="cuda")
