"""The model of lm-eval: what lm-eval's own ``hf`` says of the same weights, along a path with the other layers cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved_model
from models import NUM_LAYERS, cut, random_prompts, tiny_hf, word_tokenizer

from dynskip import LayerPath

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from dynskip.integrations.lm_eval import DynskipLM

PATH, LAYERS = LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]), "layers:0,2,3,5"
# Rounding of float32 on sums of some dozens of log-probabilities.
ATOL = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved_model(tmp_path_factory.mktemp("tiny")))


def theirs(path: LayerPath | None = None, **options: Any) -> HFLM:
    """lm-eval's own model, with the layers of ``path`` only."""
    hf_model = tiny_hf() if path is None else cut(tiny_hf(), path)
    return HFLM(pretrained=hf_model, tokenizer=word_tokenizer(), **{"batch_size": 4, **options})


def ours(folder: str, **options: Any) -> DynskipLM:
    return DynskipLM(folder, **{"dtype": "float32", "backend": "torch", "batch_size": 4, **options})


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token:03}" for token in tokens)


def texts(lengths: list[int], seed: int) -> list[str]:
    return [words(tokens) for tokens in random_prompts(lengths, seed)]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)  # type: ignore[arg-type]
        for number, each in enumerate(arguments)
    ]


def choices() -> list[tuple[str, str]]:
    """Contexts with several continuations each; one is empty, one is too long for the model."""
    contexts = ["", *texts([3, 20, 40, 62, 90], seed=1)]
    return [(context, f" {choice}") for context in contexts for choice in texts([1, 4, 2], seed=len(context))]


def greedy_choices(lm: Any) -> list[tuple[str, str]]:
    """Contexts with what ``lm`` itself goes on with."""
    contexts = texts([5, 20], seed=5)
    asked = [(context, {"until": ["none"], "max_gen_toks": 3}) for context in contexts]
    answers = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    return [(context, f" {answer.strip()}") for context, answer in zip(contexts, answers, strict=True)]


@pytest.mark.parametrize(("path", "named"), [(None, "full"), (PATH, LAYERS)])
def test_log_likelihoods_are_those_of_hf(folder: str, path: LayerPath | None, named: str) -> None:
    expected, own = theirs(path), ours(folder, path=named)
    asked = requests("loglikelihood", [*choices(), *greedy_choices(expected)])
    wanted = expected.loglikelihood(asked, disable_tqdm=True)
    got = own.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=ATOL)
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in wanted]
    assert {is_greedy for _, is_greedy in got} == {True, False}


@pytest.mark.parametrize(("path", "named"), [(None, "full"), (PATH, LAYERS)])
@pytest.mark.parametrize("max_length", [None, 20])
def test_rolling_windows_are_those_of_hf(
    folder: str, path: LayerPath | None, named: str, max_length: int | None
) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in texts([1, 19, 20, 21, 63, 64, 65, 150], seed=2)])
    wanted = theirs(path, max_length=max_length).loglikelihood_rolling(asked, disable_tqdm=True)
    got = ours(folder, path=named, max_length=max_length).loglikelihood_rolling(asked, disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=ATOL)


@pytest.mark.parametrize(("path", "named"), [(None, "full"), (PATH, LAYERS)])
def test_generated_texts_are_those_of_hf(folder: str, path: LayerPath | None, named: str) -> None:
    expected = theirs(path)
    contexts = texts([1, 7, 7, 20, 40, 70], seed=3)
    free = expected.generate_until(
        requests("generate_until", [(text, {"until": [], "max_gen_toks": 12}) for text in contexts]), disable_tqdm=True
    )
    stops = [[*text.split(), "none"][:5][-1] for text in free]
    asked = [(context, {"until": [stop], "max_gen_toks": 12}) for context, stop in zip(contexts, stops, strict=True)]
    asked += [(context, {"until": ["</s>", "w"], "max_gen_toks": 4, "do_sample": False}) for context in contexts[:2]]
    asked += [(context, {"max_gen_toks": 12}) for context in contexts]
    wanted = [expected.generate_until(requests("generate_until", [each]), disable_tqdm=True)[0] for each in asked]
    for options in ({}, {"batch_size": 1}, {"deterministic": True}, {"draft": "uniform:2"}, {"kv_bytes": 2**20}):
        own = ours(folder, path=named, **options)
        got = own.generate_until(requests("generate_until", asked), disable_tqdm=True)
        assert [text.strip() for text in got] == [text.strip() for text in wanted]


def test_sampled_texts_repeat_with_their_seed(folder: str) -> None:
    asked = requests("generate_until", [(words([5, 6, 7]), {"do_sample": True, "seed": 3, "max_gen_toks": 8})] * 2)
    own = ours(folder)
    first, second = own.generate_until(asked, disable_tqdm=True)
    assert first == second == own.generate_until(asked[:1], disable_tqdm=True)[0] != ""


def test_chats_are_written_as_hf_writes_them(folder: str, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    own = ours(folder, tokenizer=str(tmp_path))
    expected = HFLM(pretrained=tiny_hf(), tokenizer=tokenizer)
    chat = [{"role": "system", "content": "w005"}, {"role": "user", "content": "w006"}]
    answered = [*chat, {"role": "assistant", "content": "w007"}]
    assert own.apply_chat_template(chat) == expected.apply_chat_template(chat)
    assert own.apply_chat_template(answered, False) == expected.apply_chat_template(answered, False)
    assert own.chat_template(True) == template == expected.chat_template(True)
    assert own.tokenizer_name == str(tmp_path).replace("/", "__")
    own.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="dynskip: messages must fit the chat template, got: no system role"):
        own.apply_chat_template(chat)
    with pytest.raises(ValueError, match="dynskip: the model must come with a chat template, got none"):
        ours(folder).apply_chat_template(chat)


def test_results_are_cached_by_lm_eval(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ours(folder)
    cached = CachingLM(own, str(tmp_path / "cache.db"))
    asked = {
        "loglikelihood": requests("loglikelihood", choices()[:9]),
        "loglikelihood_rolling": requests("loglikelihood_rolling", [(text,) for text in texts([5, 90], seed=4)]),
        "generate_until": requests("generate_until", [(text, {"max_gen_toks": 4}) for text in texts([5, 6], seed=6)]),
    }
    first = {kind: getattr(cached, kind)(each) for kind, each in asked.items()}
    # What a killed run has scored is kept, too: the model itself hands it over.
    kept = CachingLM(ours(folder), str(tmp_path / "cut-off.db"))
    for kind, each in asked.items():
        getattr(kept.lm, kind)(each, disable_tqdm=True)
    for cache in (cached, kept):
        for kind, each in asked.items():
            monkeypatch.setattr(cache.lm, kind, lambda *_: pytest.fail("it was cached"))
            assert getattr(cache, kind)(each) == first[kind]
        cache.dbdict.close()


def test_the_default_device_of_lm_eval_is_the_cpu_where_there_is_no_other(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="dynskip.integrations.lm_eval"):
        own = ours(folder, device="cuda:0")
    if torch.cuda.is_available():
        assert own._llm.model.device.type == "cuda" and not caplog.records
    else:
        assert own._llm.model.device.type == "cpu"
        assert caplog.messages == ["dynskip runs on the CPU: torch finds no CUDA device for lm-eval's default, cuda:0"]


def test_arguments_of_the_command_line_make_it(folder: str) -> None:
    text = f"pretrained={folder},path=uniform:3,dtype=float32,backend=torch,deterministic=true,max_length=32,threads=1"
    own = DynskipLM.create_from_arg_string(text, {"batch_size": "auto", "max_batch_size": 8, "device": "cpu"})
    assert own._path == LayerPath.uniform(NUM_LAYERS, 3) and own._batch == 8 and own.max_length == 32
    assert own._llm.model.dtype == torch.float32 and own._llm.model.deterministic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "uniform:9"}, r"LayerPath.uniform: budget must lie in 1\.\.6, got 9"),
        ({"path": "half"}, "LayerPath.parse: path must be full, uniform:B, .*, got 'half'"),
        ({"path": "found:3"}, "LayerPath.found: .*dynskip search"),
        ({"device": "cuda:9"}, "from_pretrained: device must be one that this machine has, got 'cuda:9'"),
        ({"draft": "half"}, "LayerPath.parse: path must be .*, got 'half'"),
        ({"draft": "auto"}, "dynskip search"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got int8"),
        ({"max_length": 65}, r"dynskip: max_length must be a whole number, in 2\.\.64, got 65"),
        ({"max_gen_toks": 0}, "dynskip: max_gen_toks must be a whole number, at least 1, got 0"),
        ({"kv_bytes": "1G"}, "dynskip: kv_bytes must be a whole number, at least 1, got '1G'"),
        ({"threads": 100000}, r"dynskip: threads must be a whole number, in 1\.\.\d+, got 100000"),
        ({"batch_size": "0"}, "dynskip: batch_size must be a whole number, at least 1, got 0"),
        ({"tensor_parallel_size": 2}, "dynskip: model_args must be of those that dynskip knows, got tensor_parallel"),
    ],
)
def test_bad_arguments_are_told(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ours(folder, **options)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    tiny_hf().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dynskip: pretrained must come with a tokenizer, got none in "):
        ours(str(tmp_path))


def test_requests_that_do_not_fit_are_told(folder: str) -> None:
    own = ours(folder, max_length=20)
    with pytest.raises(ValueError, match=r"dynskip: a continuation must have 1\.\.20 tokens, got 21"):
        own.loglikelihood(requests("loglikelihood", [("w005", f" {texts([21], 0)[0]}")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="dynskip: max_gen_toks must leave room for a context within max_length 20"):
        own.generate_until(requests("generate_until", [("w005", {"max_gen_toks": 20})]), disable_tqdm=True)
    (empty,) = own.generate_until(requests("generate_until", [("", {"max_gen_toks": 3})]), disable_tqdm=True)
    assert empty, "a text without a context goes on behind the first token"
