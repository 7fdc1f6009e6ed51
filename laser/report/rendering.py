"""The process that renders a chat template: a request of JSON on stdin, [text, ""] or [null, why] on stdout.

Run as a file and not as a part of laser, whose imports it does not need. See chat.py.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path


def limit(seconds: int, memory: int) -> None:
    """End this process after `seconds`; fail where it takes `memory` bytes more than now."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(seconds)
    with suppress(OSError, ValueError):  # a Mac has no such file, and refuses the limit
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.RLIM_INFINITY))


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    limits = request["limits"]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template

        limit(limits["seconds"], limits["memory"])
        texts, _ = render_jinja_template(
            conversations=[request["conversation"]],
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["tokens"],
        )
        text, why = str(texts[0]), ""
        text.encode()  # half a character cannot be written
        if len(text) > limits["length"]:
            text, why = None, f"it gives {len(text)} characters, expected {limits['length']} at the most"
    except MemoryError:
        text, why = None, f"it takes more than {limits['memory'] >> 20} MiB"
    except Exception as error:  # whatever a foreign template may raise
        line = next((each.strip() for each in str(error).splitlines() if each.strip()), "")
        text, why = None, f"{type(error).__name__}: {line[:1000]}".rstrip(": ")
    sys.stdout.write(json.dumps([text, why]))


if __name__ == "__main__":
    main()
