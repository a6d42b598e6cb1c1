"""Numbers that are not finite end the request that has them, by an error that says where they begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model, word_tokenizer
from streams import PATHS, Parity, greedy
from torch import Tensor

from dynskip import LLM, LayerPath, NonFiniteError, OPTForCausalLM, SamplingParams
from dynskip.controllers import TokenContext
from dynskip.engine.closed_batch import Generation
from dynskip.engine.model_runner import ModelRunner
from dynskip.execution.executor import Predictions

PROMPTS = random_prompts([5, 1, 7])
CHOICES = [greedy(4), greedy(4, logprobs=None), greedy(4, temperature=1.0, seed=0)]


def broken_at(layer: int) -> OPTForCausalLM:
    """A model one of whose layers adds NaN to all tokens that run it."""
    broken = tiny_model("untied", deterministic=True)
    bias = broken.decoder.layers[layer].fc2.bias
    with torch.no_grad():
        bias[3] = torch.nan
    return broken


@pytest.mark.parametrize("executor", ["compact", "reference"])
@pytest.mark.parametrize("params", CHOICES, ids=["logprobs", "greedy", "drawn"])
@pytest.mark.parametrize("layer", [0, 3, NUM_LAYERS - 1])
def test_the_first_layer_that_is_not_finite(layer: int, params: SamplingParams, executor: Any) -> None:
    llm = LLM(broken_at(layer), tokenizer=word_tokenizer())
    sound = LayerPath.of(NUM_LAYERS, [other for other in range(NUM_LAYERS) if other != layer])
    paths = [sound, LayerPath.full(NUM_LAYERS), sound]
    first, failed, last = llm.generate(PROMPTS, params, paths, executor=executor)
    alone = [llm.generate([PROMPTS[index]], params, sound, executor=executor)[0] for index in (0, 2)]
    assert [first.token_ids, last.token_ids] == [output.token_ids for output in alone]
    assert executor == "reference" or [first, last] == alone  # the reference's head is not deterministic
    assert first.finish_reason == last.finish_reason == "length" and first.error is last.error is None
    assert (failed.finish_reason, failed.token_ids, failed.text) == ("error", [], "")
    assert isinstance(failed.error, NonFiniteError)
    expected = (
        f"generate: logits must be finite, got NaN first in the output of layer {layer}, in torch.float32. "
        "Check the weights, which may be damaged."
    )
    assert str(failed.error) == expected


def test_float16_that_overflows_names_itself() -> None:
    hf_model = tiny_hf("untied", dtype=torch.float16)
    with torch.no_grad():
        for layer in (1, 4):  # two such layers are too many, one is not
            hf_model.model.decoder.layers[layer].fc2.bias.fill_(60000.0)
    llm = LLM(OPTForCausalLM.from_hf(hf_model, backend="torch"))
    paths = [LayerPath.of(NUM_LAYERS, layers) for layers in ([0, 1, 2, 4], [0, 1, 2])]
    failed, sound = llm.generate(PROMPTS[:2], greedy(3), paths)
    assert len(sound.token_ids) == 3 and sound.logprobs is not None
    assert all(math.isfinite(value) for top in sound.logprobs for value in top.values())
    assert "got inf first in the output of layer 4, in torch.float16" in str(failed.error)
    assert str(failed.error).endswith("Load the model as bfloat16 or float32.")


def test_outputs_keep_what_was_finite() -> None:
    sound = tiny_model("untied", deterministic=True)
    (whole,) = LLM(sound).generate(PROMPTS[:1], greedy(6))
    place = 2
    hit = whole.token_ids[place]
    assert hit not in [*PROMPTS[0], *whole.token_ids[:place]]
    with torch.no_grad():
        sound.decoder.embed_tokens.weight[hit] = torch.nan
    (failed,) = LLM(sound).generate(PROMPTS[:1], greedy(6))
    assert failed.finish_reason == "error" and "NaN first in the embedding" in str(failed.error)
    assert failed.token_ids == whole.token_ids[: place + 1]
    assert whole.logprobs is not None and failed.logprobs == whole.logprobs[: place + 1]


def test_the_head_is_a_place_of_its_own() -> None:
    sound = tiny_model("untied", deterministic=True)
    sound.unpack_()
    with torch.no_grad():
        sound.lm_head.dense_weight()[7] = torch.nan
    (failed,) = LLM(sound).generate(PROMPTS[:1], greedy(6))
    assert "NaN first in the logits of the head" in str(failed.error)


@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
@pytest.mark.parametrize("prompt_depth", ["path", "full"])
@pytest.mark.parametrize("kind", ["mask", "controller"])
def test_tokens_with_layers_of_their_own(kind: str, prompt_depth: str, kv_policy: str) -> None:
    mask = torch.ones(3, 12, NUM_LAYERS, dtype=torch.bool)
    mask[:, :, 3] = False
    mask[1, 2:, 3] = True  # of the second prompt, which has one token, what follows its first output token

    class Masked(Parity):
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            at_end = (context.position_ids == 7) & ~context.is_prompt  # of the third prompt alone
            return at_end if layer == 3 else torch.ones_like(at_end)

    if prompt_depth == "full":
        failing = {0, 1, 2}
    else:
        failing = {1} if kind == "mask" else {2}
    paths: Any = mask if kind == "mask" else Masked()
    options: Any = {"kv_policy": kv_policy, "prompt_depth": prompt_depth}
    outputs = LLM(broken_at(3)).generate(PROMPTS, greedy(3), paths, **options)
    assert {index for index, output in enumerate(outputs) if output.error is not None} == failing
    for index in failing:
        assert "NaN first in the output of layer 3" in str(outputs[index].error)


def test_what_a_run_alone_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, num_calls = ModelRunner.decode, 0

    def flipping(self: ModelRunner, *args: Any) -> Predictions:
        nonlocal num_calls
        num_calls += 1
        logits = decode(self, *args).logits
        if num_calls == 2:
            logits[1, 5] = torch.inf
        return Predictions(logits)

    llm = LLM(tiny_model(deterministic=True))
    whole = llm.generate(PROMPTS, greedy(5))
    monkeypatch.setattr(ModelRunner, "decode", flipping)
    outputs = llm.generate(PROMPTS, greedy(5))
    assert outputs[0] == whole[0] and outputs[2] == whole[2]
    assert outputs[1].token_ids == whole[1].token_ids[:2]
    assert "got others in a batch, but not alone, in torch.float32" in str(outputs[1].error)


def test_a_run_alone_that_fails_is_the_cause() -> None:
    error = RuntimeError("not a second time")

    class Once(Parity):
        num_calls = 0

        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            self.num_calls += layer == 0
            if self.num_calls > 1:
                raise error
            return torch.ones(len(hidden_states), dtype=torch.bool)

    (output,) = LLM(broken_at(2)).generate(PROMPTS[:1], greedy(5), Once())
    assert isinstance(output.error, NonFiniteError) and output.error.__cause__ is error
    assert "in a run that could not be repeated" in str(output.error)


def test_running_alone_leaves_no_trace_in_counts_and_memory() -> None:
    model = broken_at(3)
    generation = Generation(model, PROMPTS, [greedy(4)] * 3, [PATHS[0], LayerPath.full(NUM_LAYERS), PATHS[0]])
    generation.run()
    assert generation.executor.row_counts.run[5] == 1  # of the prompt alone, which the second prompt has one token of
    assert generation.cache.num_slots_used == 0
    (failed,) = {sequence for sequence in generation.sequences if sequence.finish_reason == "error"}
    assert isinstance(failed.request.error, NonFiniteError)


def test_whoever_makes_the_steps_gets_the_error() -> None:
    generation = Generation(broken_at(3), PROMPTS, [greedy(4)] * 3)
    with pytest.raises(NonFiniteError, match=r"^generate: logits must be finite, got NaN first in the output of lay"):
        generation.prefill()


def test_what_a_controller_raises_ends_the_whole_batch() -> None:
    class Breaks(Parity):
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            raise ConnectionError("no such service")

    with pytest.raises(ConnectionError, match="no such service"):
        LLM(tiny_model()).generate(PROMPTS, greedy(3), Breaks())


def test_all_outputs_of_a_prompt_share_its_error() -> None:
    (output,) = LLM(broken_at(1)).generate(PROMPTS[:1], SamplingParams(max_tokens=3, n=3, temperature=1.0, seed=1))
    assert [sample.finish_reason for sample in output.samples] == ["error"] * 3
