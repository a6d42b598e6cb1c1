"""The model in the box: its shape, its tokenizer, and that it has learned something at every depth of its menu."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import cut, within_budget
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

from dynskip import LLM, LayerPath, SamplingParams
from dynskip import OPTForCausalLM as PathOPT
from dynskip.assets import opt_mini_directory
from dynskip.data.corpus import Instruction
from dynskip.data.examples import encode_examples
from dynskip.data.templates import INPUT_MARK, INSTRUCTION_MARK, RESPONSE_MARK, prompt_text
from dynskip.training.bits_per_byte import bits_per_byte

DIRECTORY = opt_mini_directory()
MENU = {
    "full": LayerPath.full(24),
    "uniform:12": LayerPath.uniform(24, budget=12),
    "uniform:8": LayerPath.uniform(24, budget=8),
    "uniform:4": LayerPath.uniform(24, budget=4),
}
# Written for this test: the model has seen none of it.
ROWS = [
    Instruction(
        "Explain why people sleep.",
        "",
        "People sleep because the body and the brain need time to rest. During sleep the brain stores the memories of "
        "the day, and the body repairs its muscles. Without enough sleep it is hard to learn and to stay healthy.",
    ),
    Instruction(
        "Give three tips for growing tomatoes.",
        "",
        "1. Choose a sunny place for the plants.\n2. Water them in the morning, but not too much.\n"
        "3. Tie the plants to a stick so that they can grow tall.",
    ),
    Instruction("Put the sentence into the past tense.", "She walks to the market.", "She walked to the market."),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)


def test_weights_are_bf16_and_small() -> None:
    from safetensors import safe_open

    weights = DIRECTORY / "model.safetensors"
    assert weights.stat().st_size < 25e6
    with safe_open(weights, framework="pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, it is no mapping
    assert dtypes == {"BF16"}


def test_config_is_the_one_of_the_card(model: OPTForCausalLM) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (24, 192, 4096)
    assert config.hidden_size // config.num_attention_heads % 16 == 0
    assert config.do_layer_norm_before and config.tie_word_embeddings
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "text", ["The ferry leaves at 7:45.", "naïve café 東京 🦦", "  x\n\n\ty  ", "def f(x):\n    return x"]
)
def test_tokenizer_keeps_every_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_and_config_agree(tokenizer: PreTrainedTokenizerFast, model: OPTForCausalLM) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.bos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    for mark in (INSTRUCTION_MARK, INPUT_MARK, RESPONSE_MARK):
        assert len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Name one bird of the shore."}], tokenize=False)
    assert chat == tokenizer.bos_token + prompt_text("Name one bird of the shore.")


@pytest.mark.parametrize("path", MENU.values(), ids=MENU.keys())
def test_every_path_of_the_menu_predicts_english(
    path: LayerPath, model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = encode_examples(tokenizer, ROWS, max_tokens=512)
    every_layer = model.model.decoder.layers
    model.model.decoder.layers = torch.nn.ModuleList([every_layer[layer] for layer in path.layers])
    try:
        score = bits_per_byte(lambda ids: model(input_ids=ids).logits, examples, tokenizer.pad_token_id)
    finally:
        model.model.decoder.layers = every_layer
    # Guessing evenly among the tokens costs 3.2 bits a byte here; a trigram model of such text 1.8.
    assert score.value < 1.83


@pytest.mark.parametrize("path", MENU.values(), ids=MENU)
def test_logits_are_those_of_transformers_with_the_layers_cut(model: OPTForCausalLM, path: LayerPath) -> None:
    token_ids = torch.arange(2, 242).reshape(2, 120)
    cut_model = cut(model, path)
    with torch.no_grad():
        ours = PathOPT.from_hf(model)(token_ids, paths=path).logits
        eager = cut_model(token_ids).logits
        exact = cut_model.double()(token_ids).logits
    within_budget(ours, eager, exact)


def test_a_mixed_batch_says_what_transformers_says_alone(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    llm = LLM(PathOPT.from_hf(model, deterministic=True), tokenizer)
    prompts = [llm.chat_prompt(row.instruction) for row in (*ROWS, ROWS[0])]
    paths = list(MENU.values())
    params = SamplingParams(max_tokens=24, logprobs=1)
    together = llm.generate(prompts, params, paths=paths)
    for prompt, path, output in zip(prompts, paths, together, strict=True):
        alone = llm.generate([prompt], params, paths=path)[0]
        assert (output.token_ids, output.logprobs) == (alone.token_ids, alone.logprobs)
        generated = cut(model, path).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
        )
        assert output.token_ids == generated[0, len(prompt) :].tolist()


def test_card_states_scores_below_the_bar() -> None:
    scores = json.loads((DIRECTORY / "scores.json").read_text())
    assert scores["full"] <= 1.5
    assert all(scores[name] < 1.83 for name in MENU)
    card = (DIRECTORY / "README.md").read_text()
    for name in MENU:
        assert re.search(rf"`{name}` *\| *{scores[name]:.3f}", card), f"the card must state {name}: {scores[name]:.3f}"
