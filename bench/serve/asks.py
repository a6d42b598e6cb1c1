"""Random requests of every kind that the server takes, with what the library is asked for the same; and bad ones."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.serve.client import post_of
from dynskip.engine.engine import Engine
from dynskip.llm import LLM
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

ROUTES = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
MAX_LEN = 320  # tokens of a prompt and its output
MAX_BODY = 16 * 2**20  # of the server
_MAX_PROMPT = 72
_TEXT = (
    "Name three kinds of cheese and say why bread rises while the sea is calm . A letter to the landlord should begin "
    "with a greeting ; then it tells what is broken , since when , and what you ask for . Explain how many days a week "
    "has to somebody who has never seen a calendar"
)
_WORDS = _TEXT.split()
# Texts that outputs may hold.
_STOPS = (".", "\n", " the", " and", "!", " a ", "ing ")


@dataclass(frozen=True)
class Ask:
    """A request: its kind and body, and the same for the library.

    prompts: for completions texts or token ids, for a chat its messages. kinds: what it has of all that is drawn.
    """

    route: Literal["completion", "chat"]
    body: dict[str, Any]
    prompts: list[Any]
    params: SamplingParams
    path: LayerPath
    draft: LayerPath | None
    kinds: tuple[str, ...]

    @property
    def request(self) -> bytes:
        """As it is sent."""
        return post_of(ROUTES[self.route], json.dumps(self.body).encode())


@dataclass(frozen=True)
class Bad:
    """A request that is to be refused. status: the one that it must get."""

    name: str
    request: bytes
    status: int


@dataclass
class Asks:
    """Draws requests for a model. name: what the server calls it. budgets: of its table of depths, if it has one."""

    name: str
    num_layers: int
    vocab_size: int
    budgets: tuple[int, ...]
    seed: str
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        # The same for all clients: what requests begin with is known already.
        shared = random.Random("shared")
        self._beginnings = [" ".join(shared.choices(_WORDS, k=32)) for _ in range(4)]
        self._prefixes = [[shared.randrange(4, self.vocab_size) for _ in range(40)] for _ in range(4)]

    def next(self) -> Ask:
        """Another request."""
        draw = self.draw
        is_chat, streams = draw.random() < 0.4, draw.random() < 0.5
        path, draft, body, kinds = self._depth()
        given, sampling_kinds = self._sampling()
        kinds |= sampling_kinds | {"chat" if is_chat else "completion"}
        params: dict[str, Any] = dict(given)
        if "logit_bias" in given:
            params["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        body |= given
        if streams:
            kinds.add("stream")
            body["stream"] = True
            if draw.random() < 0.5:
                usage = {"include_usage": True, "continuous_usage_stats": draw.random() < 0.3}
                body["stream_options"] = usage
        if draw.random() < 0.5:
            body["return_token_ids"] = True
        if is_chat:
            prompts, shape = self._chat(body, params, kinds)
        else:
            prompts, shape = self._completion(body, params, kinds, streams)
        kinds.add(shape)
        route: Literal["completion", "chat"] = "chat" if is_chat else "completion"
        return Ask(route, body, prompts, SamplingParams(**params), path, draft, tuple(sorted(kinds)))

    def bad(self) -> Bad:
        """A request that the server must refuse."""
        draw, completions = self.draw, ROUTES["completion"]
        good = {"prompt": [5, 6, 7], "max_tokens": 4}
        wrong: dict[str, dict[str, Any]] = {
            "a field of another type": {**good, "max_tokens": "four"},
            "a value beyond its bounds": {**good, "top_p": 2.0},
            "an unknown field": {**good, "max_token": 4},
            "a field that is not supported": {**good, "tools": [{"type": "function"}]},
            "no prompt": {"max_tokens": 4},
            "an unknown path": {**good, "path": "uniform:99"},
            "a prompt that is too long": {**good, "prompt": [5] * MAX_LEN},
            "more tokens than fit": {**good, "max_tokens": MAX_LEN},
            "more outputs than there is room for": {**good, "n": 1000},
            "a token that is none": {**good, "prompt": [self.vocab_size]},
        }
        others = ("no JSON", "an unknown model", "an unknown address", "too large", "too large, sent")
        name = draw.choice([*wrong, *others])
        if name in wrong:
            return Bad(name, post_of(completions, json.dumps(wrong[name]).encode()), 400)
        if name == "no JSON":
            body = bytes(draw.randrange(256) for _ in range(20))
            return Bad(name, post_of(completions, b"{" + body), 400)
        if name == "an unknown model":
            return Bad(name, post_of(completions, json.dumps({**good, "model": "another"}).encode()), 404)
        if name == "an unknown address":
            return Bad(name, post_of("/v1/embeddings", b"{}"), 404)
        if name == "too large, sent" and draw.random() < 0.1:
            return Bad(name, post_of(completions, b" " * (MAX_BODY + 1)), 413)
        return Bad("too large", post_of(completions, b"{", MAX_BODY + 1), 413)

    def _depth(self) -> tuple[LayerPath, LayerPath | None, dict[str, Any], set[str]]:
        """A path and a draft, and the fields that ask for them."""
        draw, num_layers = self.draw, self.num_layers
        kinds: set[str] = set()
        body: dict[str, Any] = {}
        path = LayerPath.full(num_layers)
        by_table = ["depth", "share", "model"] if self.budgets else []
        match draw.choice(["none", "path", "path", *by_table]):
            case "path":
                texts = [f"uniform:{budget}" for budget in self.budgets]
                text = draw.choice(["full", *texts, "exit:3", "layers:0,2,3"])
                path, body["path"] = LayerPath.parse(text, num_layers), text
                kinds.add("path")
            case "depth" | "share" | "model" as how:
                asked = draw.randint(1, num_layers)
                budget = next((each for each in self.budgets if each >= asked), num_layers)
                path = LayerPath.uniform(num_layers, budget)
                kinds.add(how if how != "share" else "depth in percent")
                if how == "depth":
                    body["depth"] = asked
                elif how == "model":
                    body["model"] = f"{self.name}@{asked}"
                else:
                    body["depth"] = f"{100 * asked // num_layers}%"
                    wanted = max(1, -(-(100 * asked // num_layers) * num_layers // 100))
                    budget = next((each for each in self.budgets if each >= wanted), num_layers)
                    path = LayerPath.uniform(num_layers, budget)
        draft = None
        if draw.random() < 0.2:
            text = draw.choice(["uniform:2", "exit:2"])
            draft, body["draft"] = LayerPath.parse(text, num_layers), text
            kinds.add("draft")
        return path, draft, body, kinds

    def _sampling(self) -> tuple[dict[str, Any], set[str]]:
        """Parameters by the names that server and library share, and what they are."""
        draw = self.draw
        given: dict[str, Any] = {"max_tokens": 1 + min(int(draw.expovariate(1 / 24)), 63), "temperature": 0.0}
        kinds = set()

        def add(share: float, kind: str, **values: Any) -> None:
            if draw.random() < share:
                given.update(values)
                kinds.add(kind)

        add(0.5, "sampled", temperature=draw.choice([0.3, 0.8, 1.0, 1.5]), seed=draw.randrange(2**31))
        add(0.15, "n", n=draw.randint(2, 3))
        add(0.2, "stop", stop=draw.sample(_STOPS, draw.randint(1, 3)))
        add(0.05, "include_stop_str_in_output", include_stop_str_in_output=True)
        add(0.1, "stop_token_ids", stop_token_ids=[draw.randrange(4, self.vocab_size) for _ in range(3)])
        add(0.3, "ignore_eos", ignore_eos=True)
        add(0.1, "min_tokens", min_tokens=draw.randint(0, given["max_tokens"]))
        add(0.1, "top_k", top_k=draw.choice([-1, 1, 5, 50]))
        add(0.1, "top_p", top_p=draw.choice([0.1, 0.9, 1.0]))
        add(0.1, "min_p", min_p=draw.choice([0.05, 0.3]))
        add(0.1, "repetition_penalty", repetition_penalty=draw.choice([0.8, 1.2]))
        add(0.1, "presence_penalty", presence_penalty=draw.choice([-0.5, 1.0]))
        add(0.1, "frequency_penalty", frequency_penalty=draw.choice([-0.2, 0.7]))
        biases = {str(draw.randrange(4, self.vocab_size)): draw.choice([-100.0, -1.0, 2.5]) for _ in range(3)}
        add(0.1, "logit_bias", logit_bias=biases)
        add(0.05, "skip_special_tokens", skip_special_tokens=False)
        return given, kinds

    def _chat(self, body: dict[str, Any], params: dict[str, Any], kinds: set[str]) -> tuple[list[Any], str]:
        draw = self.draw
        # Not every chat template writes what a system says; prompts begin alike all the same.
        begin = f"{draw.choice(self._beginnings)} " if draw.random() < 0.5 else ""
        messages = [{"role": "user", "content": begin + self._text()}]
        if draw.random() < 0.2:
            messages += [{"role": "assistant", "content": self._text(8)}, {"role": "user", "content": self._text(8)}]
        body["messages"] = messages
        if draw.random() < 0.3:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if draw.random() < 0.3:
            kinds.add("logprobs")
            body["logprobs"], body["top_logprobs"] = True, draw.randint(0, 5)
            params["logprobs"] = body["top_logprobs"]
        return [messages], "messages"

    def _completion(
        self, body: dict[str, Any], params: dict[str, Any], kinds: set[str], streams: bool
    ) -> tuple[list[Any], str]:
        draw = self.draw
        shape = draw.choice(["text", "text", "token ids", "token ids", "texts", "lists of token ids"])
        one = self._text if "text" in shape else self._ids
        is_list = shape in ("texts", "lists of token ids")
        prompts: list[Any] = [one() for _ in range(draw.randint(1, 3) if is_list else 1)]
        body["prompt"] = prompts if is_list else prompts[0]
        if draw.random() < 0.2:
            kinds.add("echo")
            body["echo"] = True
        if draw.random() < 0.3 and not (streams and "echo" in body):
            kinds.add("logprobs")
            body["logprobs"] = params["logprobs"] = draw.randint(0, 5)
            if "echo" in body:
                params["prompt_logprobs"] = body["logprobs"]
        if draw.random() < 0.1 and "prompt_logprobs" not in params and not streams:
            kinds.add("prompt_logprobs")
            body["prompt_logprobs"] = params["prompt_logprobs"] = draw.randint(0, 3)
        return prompts, shape

    def _text(self, most: int = 24) -> str:
        return " ".join(self.draw.choices(_WORDS, k=self.draw.randint(1, most)))

    def _ids(self) -> list[int]:
        draw = self.draw
        ids = [draw.randrange(4, self.vocab_size) for _ in range(draw.randint(1, _MAX_PROMPT - 40))]
        return draw.choice(self._prefixes) + ids if draw.random() < 0.4 else ids


@dataclass(frozen=True)
class Told:
    """One output as both sides tell it. None stands for what was not asked for.

    logprobs: of each token, of the prompt's first where they are echoed.
    """

    text: str
    finish_reason: str
    token_ids: list[int] | None
    logprobs: list[float | None] | None


def library_answer(llm: LLM, engine: Engine, ask: Ask) -> list[Told]:
    """What ``ask`` becomes without a server, each prompt alone in ``engine``, which is one of the model of ``llm``."""
    found = []
    for prompt in ask.prompts:
        if ask.route == "chat":
            prompt_ids = llm.chat_prompt(prompt, special_tokens=False)
        else:
            prompt_ids = llm.encode(prompt)
        echo = ""
        if ask.body.get("echo"):
            echo = prompt if isinstance(prompt, str) else str(llm.tokenizer.decode(prompt_ids))
        engine.add_request(prompt_ids, ask.params, ask.path, draft=ask.draft)
        (output,) = engine.run()
        of_prompt = []
        if ask.body.get("echo") and ask.params.logprobs is not None:
            of_prompt = [
                None if each is None else each[token]
                for token, each in zip(prompt_ids, output.prompt_logprobs or [], strict=True)
            ]
        for sample in output.samples:
            logprobs = None
            if sample.logprobs is not None:
                own = [each[token] for token, each in zip(sample.token_ids, sample.logprobs, strict=True)]
                logprobs = [*of_prompt, *own]
            token_ids = sample.token_ids if ask.body.get("return_token_ids") else None
            text = llm.text(sample.token_ids, ask.params) or ""
            found.append(Told(echo + text, sample.finish_reason, token_ids, logprobs))
    return found


def served_answer(ask: Ask, answers: list[dict[str, Any]]) -> list[Told]:
    """The outputs in ``answers``: one whole answer, or all chunks of a stream. Raises ValueError for what is none."""
    parts: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        if "error" in answer:
            raise ValueError(f"an error in mid-stream, {answer['error']}")
        for choice in answer["choices"]:
            parts.setdefault(choice["index"], []).append(choice)
    wanted = len(ask.prompts) * ask.params.n
    if sorted(parts) != list(range(wanted)):
        raise ValueError(f"outputs 0..{wanted - 1}, got {sorted(parts)}")
    found = []
    for index in range(wanted):
        reasons = [choice["finish_reason"] for choice in parts[index]]
        if reasons[-1] is None or any(reason is not None for reason in reasons[:-1]):
            raise ValueError(f"one reason at the end of an output, got {reasons}")
        told = [choice["logprobs"] for choice in parts[index] if choice["logprobs"] is not None]
        logprobs = None
        if ask.params.logprobs is not None:
            logprobs = [value for each in told for value in _values(each)]
        token_ids = None
        if ask.body.get("return_token_ids"):
            token_ids = [token for choice in parts[index] for token in choice.get("token_ids", ())]
        found.append(Told("".join(map(_text_of, parts[index])), reasons[-1], token_ids, logprobs))
    return found


def _values(logprobs: dict[str, Any]) -> list[float | None]:
    if "content" in logprobs:
        return [each["logprob"] for each in logprobs["content"]]
    return list(logprobs["token_logprobs"])


def _text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice["delta"]).get("content") or "")
