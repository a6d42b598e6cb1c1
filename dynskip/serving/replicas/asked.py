"""`Asked`: as much of a request's body as its placement needs. What is wrong with a body, the replica says."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dynskip.paths import LayerPath
from dynskip.serving.depths import DepthTable
from dynskip.serving.errors import APIError

# Of a completion's prompt, what counts as its beginning: characters of a text, or token ids.
_NUM_CHARS, _NUM_TOKENS = 256, 64
# Messages before the first of any other role are the system's.
_SYSTEM = ("system", "developer")
_MOST_OUTPUTS = 2**20


@dataclass(frozen=True)
class Asked:
    """A request for its placement. prefix: stands for the beginning of its prompt."""

    path: LayerPath
    prefix: str
    num_outputs: int

    @staticmethod
    def of(body: bytes, table: DepthTable) -> Asked:
        """What ``body`` asks for; of one that is wrong, one output along the server's own path."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            fields = {}
        prompts = _prompts(fields.get("prompt"))
        num_each = fields.get("n")
        num_outputs = len(prompts) * (num_each if type(num_each) is int else 1)
        return Asked(_path(fields, table), _prefix(fields, prompts[0]), min(max(num_outputs, 1), _MOST_OUTPUTS))


def _path(fields: dict[str, Any], table: DepthTable) -> LayerPath:
    model, path, depth = fields.get("model"), fields.get("path"), fields.get("depth")
    depth_is_one = depth is None or type(depth) is int or isinstance(depth, str)
    if isinstance(model, str | None) and isinstance(path, str | None) and depth_is_one:
        with suppress(APIError):
            return table.of(model, path, depth, "none").named.path
    return table.of(None, None, None, "none").named.path


def _prompts(prompt: object) -> list[Any]:
    """The prompts of a completion, at least one: a text, token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def _prefix(fields: dict[str, Any], prompt: object) -> str:
    """Of a chat its messages up to the first that is not the system's, of a completion how its first prompt begins."""
    beginning: object = None
    messages = fields.get("messages")
    if isinstance(messages, list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        end = next((index for index, role in enumerate(roles) if role not in _SYSTEM), len(roles))
        beginning = messages[: end + 1]
    elif isinstance(prompt, str):
        beginning = prompt[:_NUM_CHARS]
    elif isinstance(prompt, list):
        beginning = prompt[:_NUM_TOKENS]
    return hashlib.blake2b(json.dumps(beginning, sort_keys=True).encode(), digest_size=8).hexdigest()
