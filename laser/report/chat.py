"""The instruction format of a model, shown by rendering its own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laser.errors import first_line

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


def render(template: str, tokenizer_config: Mapping[str, Any]) -> tuple[str | None, str]:
    """(the sample conversation as the model reads it, "") or (None, why it could not be rendered).

    Rendered by transformers in its sandbox: a template comes with the model and can hold anything.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tokenizer_config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        tokens[name] = token if isinstance(token, str) else ""
    try:
        texts, _ = render_jinja_template(
            conversations=[[dict(message) for message in CONVERSATION]],
            chat_template=template,
            add_generation_prompt=True,
            **tokens,
        )
    except Exception as error:  # whatever a foreign template may raise: the card must be written all the same
        return None, f"{type(error).__name__}: {first_line(error)}"
    return str(texts[0]), ""
