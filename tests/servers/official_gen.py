"""A tiny Gen guard that speaks the official form behind the official prompt, for real servers.

It is trained once, in some minutes, and kept in the folder that ``TIDEGATE_SERVERS`` names. Its heads are as wide as
servers want them. ``python official_gen.py FOLDER`` makes it.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from gen_folder import ToyRow, toy_row, write_gen_folder
from tidegate.prompts import OFFICIAL
from tidegate.types import Target

_named = os.environ.get("TIDEGATE_SERVERS")
SERVERS = Path(_named) if _named else None
"""Where the environments of the servers are, and the guard; None when these tests are not wanted."""


def official_gen(folder: Path) -> Path:
    """The folder ``gen`` in this one, with the guard; it is made when it is not there."""
    made = folder / "gen"
    if not (made / "model.safetensors").exists():
        made.mkdir(parents=True, exist_ok=True)
        write_gen_folder(
            made,
            trained=True,
            forms=tuple(OFFICIAL.values()),
            template=chat_template(),
            steps=700,
            batch=16,
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
        )
    return made


def chat_template() -> str:
    """A chat template that renders the official prompts."""
    parts = {target: (_jinja(form.opening), _jinja(form.closing)) for target, form in OFFICIAL.items()}
    return (
        "{%- set about_prompt = messages[-1].role == 'user' -%}\n"
        f"{{{{- {parts[Target.PROMPT][0]} if about_prompt else {parts[Target.RESPONSE][0]} -}}}}\n"
        "{%- for message in messages -%}\n"
        "{%- if loop.first -%}{%- if message.role != 'assistant' -%}{{- 'USER: ' + message.content -}}{%- endif -%}\n"
        "{%- elif messages[loop.index0 - 1].role == 'system' and message.role == 'user' -%}"
        "{{- '\\n\\n' + message.content -}}\n"
        "{%- elif message.role == 'assistant' -%}{{- '\\n\\nASSISTANT: ' + message.content -}}\n"
        "{%- elif message.role == 'user' -%}{{- '\\n\\nUSER: ' + message.content -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{{{- '\\n\\n' + ({parts[Target.PROMPT][1]} if about_prompt else {parts[Target.RESPONSE][1]}) -}}}}\n"
    )


def garbled_template() -> str:
    """A chat template that is not that of a guard, as found with some GGUF files."""
    return "{%- for message in messages -%}{{- message.role + ': ' + message.content + '\\n' -}}{%- endfor -%}"


def rows(count: int) -> list[ToyRow]:
    """Rows about prompts and answers in turn, that the guard was not trained on."""
    rng, forms = random.Random(11), tuple(OFFICIAL.values())
    return [toy_row(rng, forms[place % len(forms)]) for place in range(count)]


def _jinja(text: str) -> str:
    """A text as a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


if __name__ == "__main__":
    sys.stdout.write(f"{official_gen(Path(sys.argv[1]))}\n")
