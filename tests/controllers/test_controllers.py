"""Controllers: static ones, one of a user's own, and the hidden-state gate, which decides while a step runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, cpu_backend, ragged_batch, random_prompts, tiny_model
from torch import Tensor

from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams
from dynskip.controllers import (
    HiddenStateGate,
    SequenceController,
    StaticController,
    TokenContext,
    TokenController,
)

PROMPTS = random_prompts([5, 1, 7])
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=VOCAB_SIZE)


@functools.cache
def model(backend: str = "torch") -> OPTForCausalLM:
    return tiny_model(backend=backend, deterministic=True)


def random_gate(**options: Any) -> HiddenStateGate:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_LAYERS, 2, 32, generator=generator)
    return HiddenStateGate(weight, torch.randn(NUM_LAYERS, 2, generator=generator) * 0.1, **options)


class Recorder:
    """Passes on what a gate decides, and writes down for which sequence, position and layer it did."""

    def __init__(self, gate: TokenController) -> None:
        self.gate = gate
        self.decisions: dict[tuple[int, int, int], bool] = {}
        self.contexts: list[TokenContext] = []

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: what the gate says."""
        active = self.gate.active(layer, hidden_states, context)
        self.contexts.append(context)
        for row, runs in enumerate(active.tolist()):
            self.decisions[int(context.seq_ids[row]), int(context.position_ids[row]), layer] = runs
        return active

    def mask(self, num_seqs: int, num_tokens: int) -> Tensor:
        """[B, T, L], bool: the decisions, False where none was asked for."""
        mask = torch.zeros(num_seqs, num_tokens, NUM_LAYERS, dtype=torch.bool)
        for place, runs in self.decisions.items():
            mask[place] = runs
        return mask


def test_a_static_controller_is_its_paths() -> None:
    llm = LLM(model())
    paths = [LayerPath.of(NUM_LAYERS, layers) for layers in ([0, 3], [1], [2, 5])]
    assert llm.generate(PROMPTS, PARAMS, StaticController(paths)) == llm.generate(PROMPTS, PARAMS, paths)
    assert llm.generate(PROMPTS, PARAMS, StaticController(paths[0])) == llm.generate(PROMPTS, PARAMS, paths[0])


def test_a_controller_per_sequence_sees_prompts_and_embeddings() -> None:
    class ByLength:
        """Short prompts take fewer layers; what it was shown is kept."""

        def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> list[LayerPath]:
            self.shown = prompt_ids, prompt_embeddings
            return [LayerPath.uniform(NUM_LAYERS, budget=min(NUM_LAYERS, len(ids))) for ids in prompt_ids]

    controller = ByLength()
    assert isinstance(controller, SequenceController) and not isinstance(controller, TokenController)
    outputs = LLM(model()).generate(PROMPTS, PARAMS, controller)
    assert [output.path for output in outputs] == [LayerPath.uniform(NUM_LAYERS, budget=b) for b in (5, 1, 6)]
    ids, embeddings = controller.shown
    table = model().decoder.embed_tokens.weight
    for prompt, shown, embedding in zip(PROMPTS, ids, embeddings, strict=True):
        assert shown.dtype == torch.int64 and shown.tolist() == prompt
        assert torch.equal(embedding, table[prompt])
    input_ids, attention_mask = ragged_batch([3, 6], "left")
    logits = model()(input_ids, attention_mask, paths=ByLength()).logits
    paths = [LayerPath.uniform(NUM_LAYERS, budget=3), LayerPath.full(NUM_LAYERS)]
    assert torch.equal(logits, model()(input_ids, attention_mask, paths=paths).logits)


def test_the_gate_decides_as_its_formula_says() -> None:
    gate = random_gate()
    hidden_states = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    context = TokenContext(torch.zeros(9, dtype=torch.int32), torch.arange(9), torch.zeros(9, dtype=torch.bool))
    for layer in range(NUM_LAYERS):
        active = gate.active(layer, hidden_states, context)
        if layer in (0, NUM_LAYERS - 1):
            assert active.all()
            continue
        assert gate.bias is not None
        logits = hidden_states.double() @ gate.weight[layer].double().T + gate.bias[layer].double()
        assert torch.equal(active, logits[:, 1] >= logits[:, 0])
        assert active.any() and not active.all()
    assert gate.num_layers == NUM_LAYERS


def test_always_names_the_layers_that_run_anyway() -> None:
    # Index 0 of the bias says skip.
    never = torch.tensor([[1.0, 0.0]]).expand(NUM_LAYERS, 2)
    gate = HiddenStateGate(torch.zeros(NUM_LAYERS, 2, 32), never, always=[1, 4])
    outputs = LLM(model()).generate(PROMPTS, PARAMS, gate, kv_policy="evict")
    expected = LLM(model()).generate(PROMPTS, PARAMS, LayerPath.of(NUM_LAYERS, [1, 4]))
    assert [output.logprobs for output in outputs] == [output.logprobs for output in expected]
    nothing = HiddenStateGate(torch.zeros(NUM_LAYERS, 2, 32), never, always=[])
    outputs = LLM(model()).generate(PROMPTS, PARAMS, nothing, kv_policy="evict")
    empty = LayerPath.of(NUM_LAYERS, [], allow_empty=True)
    expected = LLM(model()).generate(PROMPTS, PARAMS, empty)
    assert [output.logprobs for output in outputs] == [output.logprobs for output in expected]


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("prompt_depth", ["path", "full"])
@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_a_gated_sequence_in_a_batch_is_the_sequence_alone(kv_policy: str, prompt_depth: str, backend: str) -> None:
    llm = LLM(model(cpu_backend(backend)))
    options = {"kv_policy": kv_policy, "prompt_depth": prompt_depth}
    outputs = llm.generate(PROMPTS, PARAMS, random_gate(), **options)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.path is None
        assert llm.generate([prompt], PARAMS, random_gate(), **options) == [output]


@pytest.mark.parametrize("prompt_depth", ["path", "full"])
@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
def test_a_gate_is_the_mask_of_its_decisions(kv_policy: str, prompt_depth: str) -> None:
    llm = LLM(model())
    recorder = Recorder(random_gate())
    options = {"kv_policy": kv_policy, "prompt_depth": prompt_depth}
    outputs = llm.generate(PROMPTS, PARAMS, recorder, **options)
    mask = recorder.mask(len(PROMPTS), 12)
    assert 0.3 < mask[:, :4].float().mean() < 0.9 or prompt_depth == "full"
    assert llm.generate(PROMPTS, PARAMS, mask, **options) == outputs


def test_the_gate_in_the_model_is_the_mask_of_its_decisions() -> None:
    input_ids, attention_mask = ragged_batch([3, 6, 1], "right")
    for kv_policy in ("propagate", "evict", "share"):
        recorder = Recorder(random_gate())
        logits = model()(input_ids, attention_mask, paths=recorder, kv_policy=kv_policy).logits
        # Padded on the right, position and place agree.
        mask = recorder.mask(3, 6)
        assert torch.equal(model()(input_ids, attention_mask, paths=mask, kv_policy=kv_policy).logits, logits)


def test_the_reference_executor_asks_the_gate_too() -> None:
    llm = LLM(model())
    expected = llm.generate(PROMPTS, PARAMS, random_gate())
    outputs = llm.generate(PROMPTS, PARAMS, random_gate(), executor="reference")
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_what_a_gate_is_told_of_each_row() -> None:
    recorder = Recorder(random_gate())
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 1, 2)]
    LLM(model()).generate(PROMPTS, params, recorder)
    prefill, decode, last = (recorder.contexts[step * NUM_LAYERS] for step in range(3))
    assert len(recorder.contexts) == 3 * NUM_LAYERS
    assert prefill.seq_ids.tolist() == [0] * 5 + [1] + [2] * 7
    assert prefill.position_ids.tolist() == [*range(5), 0, *range(7)]
    assert prefill.is_prompt.all()
    # The second prompt had all its tokens after the prefill; rows count the sequences of the step.
    assert decode.seq_ids.tolist() == [0, 1] and decode.position_ids.tolist() == [5, 7]
    assert last.seq_ids.tolist() == [0] and last.position_ids.tolist() == [6]
    assert not decode.is_prompt.any() and not last.is_prompt.any()


def test_a_gate_serves_copies_of_a_prompt() -> None:
    llm = LLM(model())
    params = SamplingParams(max_tokens=4, temperature=1.4, seed=3, n=3, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, random_gate(), kv_policy="share")
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (expected,) = llm.generate([prompt], params, random_gate(), kv_policy="share")
        assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in expected.samples]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.zeros(6, 3, 32)}, r"weight must be \[L, 2, C\], got \[6, 3, 32\]"),
        ({"weight": torch.zeros(6, 32)}, r"weight must be \[L, 2, C\], got \[6, 32\]"),
        ({"weight": torch.zeros(6, 2, 32), "bias": torch.zeros(6)}, r"bias must be \[6, 2\], got \[6\]"),
        ({"weight": torch.zeros(6, 2, 32), "always": [6]}, r"always must name layers in 0\.\.5, got 6"),
        ({"weight": torch.zeros(6, 2, 32), "always": [-1]}, r"always must name layers in 0\.\.5, got -1"),
        ({"weight": torch.full((6, 2, 32), torch.nan)}, "weight must hold finite numbers only, got NaN or infinity"),
        (
            {"weight": torch.zeros(6, 2, 32), "bias": torch.full((6, 2), torch.inf)},
            "bias must hold finite numbers only, got NaN or infinity",
        ),
    ],
)
def test_a_gate_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^HiddenStateGate: {message}"):
        HiddenStateGate(**options)


def test_a_gate_for_another_model() -> None:
    with pytest.raises(ValueError, match=r"the controller must decide for 6 layers, got 5"):
        LLM(model()).generate(PROMPTS, PARAMS, HiddenStateGate(torch.zeros(5, 2, 32)))
    with pytest.raises(ValueError, match=r"weight must be \[L, 2, 32\] for this model, got \[6, 2, 16\]"):
        LLM(model()).generate(PROMPTS, PARAMS, HiddenStateGate(torch.zeros(6, 2, 16)))


def test_controllers_that_answer_wrongly() -> None:
    class Answers:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> Any:
            return self.answer

    llm = LLM(model())
    full = LayerPath.full(NUM_LAYERS)
    with pytest.raises(TypeError, match=r"choose_paths must return a list of LayerPath, got .*NoneType"):
        llm.generate(PROMPTS, PARAMS, Answers(None))
    with pytest.raises(TypeError, match=r"choose_paths must return a list of LayerPath, got .*LayerPath"):
        llm.generate(PROMPTS, PARAMS, Answers(full))
    with pytest.raises(TypeError, match=r"paths must be a LayerPath, a list of them"):
        llm.generate(PROMPTS, PARAMS, Answers([0, 1, 2]))
    with pytest.raises(ValueError, match=r"paths must be one per sequence, got 2 for 3 sequences"):
        llm.generate(PROMPTS, PARAMS, Answers([full, full]))
    with pytest.raises(ValueError, match=r"StaticController: paths must be one per prompt, got 2 for 3 prompts"):
        llm.generate(PROMPTS, PARAMS, StaticController([full, full]))

    class Counts:
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            return torch.ones(1, dtype=torch.bool)

    with pytest.raises(TypeError, match=r"controller: active must return bool \[5\], got torch.bool \[1\]"):
        llm.generate(PROMPTS, PARAMS, Counts())
