"""The instruction format of a model, shown by rendering its own chat template."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from laser.errors import LONGEST

SECONDS, RENDER_SECONDS = 10, 180  # for rendering, and with the start of its process
MEMORY, LENGTH = 1 << 29, 100_000  # bytes more than at its start; characters
CONVERSATION = (
    {"role": "user", "content": "{first question}"},
    {"role": "assistant", "content": "{first answer}"},
    {"role": "user", "content": "{second question}"},
)


def find_template(tokenizer_config: Mapping[str, Any], file: str | None) -> str | None:
    """The template that transformers would use: chat_template.jinja (`file`), else the one named "default", or the
    only one, in tokenizer_config.json. None where there is none."""
    if file:
        return file
    inside = tokenizer_config.get("chat_template")
    if isinstance(inside, list):
        named = {entry.get("name"): entry.get("template") for entry in inside if isinstance(entry, dict)}
        inside = named.get("default") or next(iter(named.values()), None)
    return inside if isinstance(inside, str) and inside.strip() else None


@lru_cache(maxsize=16)
def _rendered(request: str) -> tuple[str | None, str]:
    """What rendering.py says to `request`, in a process of its own."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("rendering.py"))]
    try:
        child = subprocess.run(command, input=request.encode(), capture_output=True, timeout=RENDER_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"it took longer than {RENDER_SECONDS} s"
    except OSError as error:
        return None, f"no process could be started for it ({error.strerror})"
    if child.returncode == -signal.SIGALRM:
        return None, f"it took longer than {SECONDS} s"
    try:
        text, why = json.loads(child.stdout)
    except ValueError:
        return None, f"its process ended with {child.returncode}"
    return text, why


def render_chat(template: str, tokenizer_config: Mapping[str, Any]) -> tuple[str | None, str]:
    """(the sample conversation as the model reads it, "") or (None, why it could not be rendered).

    Rendered by transformers in its sandbox, which limits neither time nor memory: a template comes with the model and
    can hold anything. So it is done by a process of its own, which ends after SECONDS, MEMORY or LENGTH.
    """
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tokenizer_config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        tokens[name] = token if isinstance(token, str) else ""
    limits = {"seconds": SECONDS, "memory": MEMORY, "length": LENGTH}
    request = {"template": template, "tokens": tokens, "conversation": CONVERSATION, "limits": limits}
    text, why = _rendered(json.dumps(request))
    return text, why if len(why) <= LONGEST else why[:LONGEST] + " ..."
