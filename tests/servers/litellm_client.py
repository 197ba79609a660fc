"""LiteLLM's own Python client, run by LiteLLM's own Python: reads requests as JSON lines, and writes what came.

Each line has the arguments of ``litellm.completion``. What is written for it: the texts of the chunks (one for a whole
answer), the finish reason, and the kind of the error if there was one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm


def asked(options: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = litellm.completion(**options)
        if not options.get("stream"):
            choice = answer.choices[0]
            return {"texts": [choice.message.content], "finish_reason": choice.finish_reason}
        found: dict[str, Any] = {"texts": [], "finish_reason": None}
        for chunk in answer:
            if chunk.choices[0].delta.content:
                found["texts"].append(chunk.choices[0].delta.content)
            found["finish_reason"] = chunk.choices[0].finish_reason or found["finish_reason"]
        return found
    except litellm.exceptions.APIError as error:
        return {"error": type(error).__name__}


if __name__ == "__main__":
    print(json.dumps([asked(json.loads(line)) for line in sys.stdin]))
