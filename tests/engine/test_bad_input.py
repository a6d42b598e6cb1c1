"""What a caller gets wrong: one clear line, before anything has run."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, tiny_hf, tiny_model, word_tokenizer

from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams
from dynskip.execution import kv_cache
from dynskip.execution.kv_cache import KVCacheMemoryError

LIMIT = 64  # positions of the tiny model
FULL = LayerPath.full(NUM_LAYERS)


@functools.cache
def llm() -> LLM:
    return LLM(tiny_model(), tokenizer=word_tokenizer())


@pytest.fixture
def untouched() -> Any:
    """Fails the test if a layer ran after all: a mistake is found before the work, not in the midst of it."""
    counts = llm().model.executor().row_counts
    counts.reset()
    yield
    assert not any(counts.run) and not any(counts.kv)


MASK_3D = torch.ones(1, 30, NUM_LAYERS, dtype=torch.bool)

GENERATE_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty batch": ({"prompts": []}, ValueError, "prompts must hold at least one prompt, got none"),
    "empty prompt": ({"prompts": [[5], []]}, ValueError, "prompt 1 must hold at least one token, got none"),
    "empty text": ({"prompts": [""]}, ValueError, "prompt 0 must hold at least one token, got empty text"),
    "blank text": ({"prompts": ["  "]}, ValueError, "prompt 0 must hold at least one token, got none"),
    "one text without its list": ({"prompts": "w005"}, TypeError, "prompts must be a list of .* got str. Put a single"),
    "a prompt of another type": ({"prompts": [3]}, TypeError, "prompt 0 must be text or a list of token ids, got int"),
    "a float among the ids": ({"prompts": [[5, 2.0]]}, TypeError, "prompt 0 must be text or a list of token ids"),
    "a truth value among the ids": (
        {"prompts": [[5, True]]},
        TypeError,
        "prompt 0 must be text or a list of token ids",
    ),
    "one array without its list": (
        {"prompts": torch.ones(3).long()},
        TypeError,
        "prompts must be a list of .* got Tensor. Put a single",
    ),
    "an array of three dimensions": (
        {"prompts": torch.ones(1, 3, 2).long()},
        TypeError,
        "prompts must be a list of .* got Tensor",
    ),
    "an array of numbers that are no ids": (
        {"prompts": torch.ones(1, 3)},
        TypeError,
        "prompt 0 must be text or a list of token ids, got Tensor",
    ),
    "bytes": ({"prompts": [b"w005"]}, TypeError, "prompt 0 must be text or .* got bytes. Decode it to text"),
    "bytes without their list": ({"prompts": b"w005"}, TypeError, "prompts must be a list of .* got bytes"),
    "a lone surrogate": (
        {"prompts": ["w005", "w\ud8005"]},
        ValueError,
        r"prompt 1 must be text without lone surrogates, got 'w\\ud8005'",
    ),
    "more outputs than a batch has": (
        {"prompts": [[5]] * 65, "params": SamplingParams(n=1024)},
        ValueError,
        "prompts must have at most 65536 outputs together, got 66560. .* use an Engine",
    ),
    "more logprobs than tokens": (
        {"prompts": [[5], [6]], "params": [SamplingParams(), SamplingParams(logprobs=VOCAB_SIZE + 1)]},
        ValueError,
        f"prompt 1: logprobs must be at most {VOCAB_SIZE}, the vocabulary, got {VOCAB_SIZE + 1}",
    ),
    "a stop token that cannot come": (
        {"params": SamplingParams(stop_token_ids=[3, VOCAB_SIZE])},
        ValueError,
        rf"prompt 0: stop_token_ids must hold token ids in 0\.\.{VOCAB_SIZE - 1}, got {VOCAB_SIZE}",
    ),
    "new tokens beyond all sense": (
        {"params": SamplingParams(max_tokens=10**5000)},
        ValueError,
        "prompt 0 must fit 64 positions, got 1 prompt and int of very many digits new tokens",
    ),
    "no room for a token": (
        {"prompts": [[5] * 64], "params": SamplingParams(max_tokens=None)},
        ValueError,
        "prompt 0 must fit 64 positions, got 64 prompt and 1 new tokens",
    ),
    "prompt and new tokens over the limit": (
        {"prompts": [[5] * 40], "params": SamplingParams(max_tokens=25)},
        ValueError,
        r"prompt 0 must fit 64 positions, got 40 prompt and 25 new tokens\. Shorten the prompt or lower max_tokens",
    ),
    "prompt over the limit": (
        {"prompts": [[5] * 65]},
        ValueError,
        "prompt 0 must fit 64 positions, got 65 prompt and 16",
    ),
    "token id too large": (
        {"prompts": [[5], [4, VOCAB_SIZE, 7]]},
        ValueError,
        rf"prompt 1 must hold token ids in 0\.\.{VOCAB_SIZE - 1}, got {VOCAB_SIZE}",
    ),
    "negative token id": ({"prompts": [[5, -1]]}, ValueError, rf"token ids in 0\.\.{VOCAB_SIZE - 1}, got -1"),
    "too few params": (
        {"prompts": [[5], [6]], "params": [SamplingParams()]},
        ValueError,
        "params must be one for all or one per prompt, got 1 for 2 prompts",
    ),
    "params of another type": ({"params": {"max_tokens": 3}}, TypeError, "params must be SamplingParams"),
    "params in a list of another type": ({"params": [3]}, TypeError, "params must be SamplingParams"),
    "path for another depth": (
        {"paths": LayerPath.full(24)},
        ValueError,
        "paths must be for 6 layers, got a path for 24",
    ),
    "too few paths": (
        {"prompts": [[5], [6]], "paths": [FULL]},
        ValueError,
        "paths must be one per sequence, got 1 for 2 sequences",
    ),
    "too many paths": ({"paths": [FULL, FULL]}, ValueError, "paths must be one per sequence, got 2 for 1 sequences"),
    "paths of another type": (
        {"paths": [[0, 1]]},
        TypeError,
        r"paths must be .* got list, whose element 0 is \[0, 1\]",
    ),
    "a path as text": ({"paths": "uniform:4"}, TypeError, "got str. LayerPath.parse reads texts such as 'uniform:8'"),
    "a path of no layer in a mask": (
        {"paths": torch.zeros(1, NUM_LAYERS, dtype=torch.bool)},
        ValueError,
        r"must run at least one layer for each sequence, got none for sequence 0\. .*allow_empty=True",
    ),
    "mask dtype": (
        {"paths": torch.ones(1, NUM_LAYERS)},
        TypeError,
        r"paths must be bool \[1, 6\], got torch.float32. Use paths.bool\(\)",
    ),
    "per-token mask dtype": (
        {"paths": torch.ones(1, 30, NUM_LAYERS, dtype=torch.int64)},
        TypeError,
        r"paths must be bool \[1, T, 6\], got torch.int64. Use paths.bool\(\)",
    ),
    "mask depth": (
        {"paths": torch.ones(1, 5, dtype=torch.bool)},
        ValueError,
        r"paths must be bool \[1, 6\], got shape \[1, 5\]",
    ),
    "mask batch": (
        {"paths": torch.ones(3, NUM_LAYERS, dtype=torch.bool)},
        ValueError,
        r"paths must be bool \[1, 6\], got shape \[3, 6\]",
    ),
    "mask of one dimension": (
        {"paths": torch.ones(NUM_LAYERS, dtype=torch.bool)},
        ValueError,
        r"paths must be bool \[1, 6\] or \[1, T, 6\], got shape \[6\]",
    ),
    "per-token mask batch": (
        {"paths": MASK_3D.expand(2, -1, -1)},
        ValueError,
        r"paths must be bool \[1, T, 6\], got shape \[2, 30, 6\]",
    ),
    "per-token mask too short": (
        {"prompts": [[5, 6, 7]], "paths": MASK_3D[:, :9], "params": SamplingParams(max_tokens=8)},
        ValueError,
        r"generate: prompt 0: paths must cover 10 tokens, got T=9\. Give T >= prompt \+ max_tokens - 1 rows",
    ),
    "kv_policy with paths": (
        {"paths": FULL, "kv_policy": "evict"},
        ValueError,
        r"kv_policy must be left out with per-sequence paths, got 'evict'\. .* give a \[B, T, L\] mask to choose",
    ),
    "kv_policy with a mask per sequence": (
        {"paths": torch.ones(1, NUM_LAYERS, dtype=torch.bool), "kv_policy": "propagate"},
        ValueError,
        "kv_policy must be left out with per-sequence paths, got 'propagate'",
    ),
    "kv_policy without paths": ({"kv_policy": "share"}, ValueError, "kv_policy must be left out with per-sequence"),
    "prompt_depth with paths": (
        {"paths": FULL, "prompt_depth": "full"},
        ValueError,
        "prompt_depth must be left out with per-sequence paths, got 'full'",
    ),
    "unknown kv_policy": (
        {"paths": MASK_3D, "kv_policy": "absent"},
        ValueError,
        "generate: kv_policy must be 'propagate', 'evict' or 'share', got 'absent'",
    ),
    "unknown prompt_depth": (
        {"paths": MASK_3D, "prompt_depth": "half"},
        ValueError,
        "prompt_depth must be 'path' or 'full', got 'half'",
    ),
    "unknown executor": ({"executor": "fast"}, ValueError, "executor must be 'compact' or 'reference', got 'fast'"),
    "unknown option": ({"max_tokens": 3}, TypeError, "unexpected keyword argument 'max_tokens'"),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("mistake", GENERATE_MISTAKES)
def test_generate(mistake: str) -> None:
    arguments, error, message = GENERATE_MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        llm().generate(**{"prompts": [[5]], **arguments})
    assert "\n" not in str(caught.value)


def test_generate_without_a_tokenizer() -> None:
    bare = LLM(tiny_model())
    with pytest.raises(
        ValueError, match=r"prompt 0 must be token ids, got text and no tokenizer. Pass tokenizer= to LLM"
    ):
        bare.generate(["hello"])
    with pytest.raises(ValueError, match=r"stop must be left out without a tokenizer. Use stop_token_ids"):
        bare.generate([[5]], SamplingParams(stop="x"))


@pytest.mark.usefixtures("untouched")
def test_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # An entry takes 2 x 2 heads x 16 x 4 bytes = 256 bytes, 4 bytes more in its table, and 12 in the list of slots.
    monkeypatch.setattr(kv_cache, "available_bytes", lambda device: 2**20)
    message = r"needs 1\.5 MiB for 5760 entries of 32 sequences, got 1\.0 MiB free on cpu, which holds (\d+) entries"
    with pytest.raises(KVCacheMemoryError, match=message) as caught:
        llm().generate([[5] * 20] * 32, SamplingParams(max_tokens=11))
    assert isinstance(caught.value, MemoryError)
    found = re.search(message, str(caught.value))
    assert found is not None and 0.95 * 2**20 < int(found[1]) * 272 <= 2**20


def test_a_shorter_path_fits_where_the_full_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_bytes", lambda device: 2**20)
    params = SamplingParams(max_tokens=11, ignore_eos=True)
    outputs = llm().generate([[5] * 20] * 32, params, LayerPath.uniform(NUM_LAYERS, budget=3))
    assert all(len(output.token_ids) == 11 for output in outputs)


FORWARD_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float ids": (
        {"input_ids": torch.ones(1, 3)},
        TypeError,
        r"input_ids must be int64 \[B, T\], got torch.float32 \[1, 3\]",
    ),
    "one dimension": (
        {"input_ids": torch.tensor([5])},
        TypeError,
        r"input_ids must be int64 \[B, T\], got torch.int64 \[1\]",
    ),
    "a list": ({"input_ids": [[5, 6]]}, TypeError, r"input_ids must be int64 \[B, T\], got list"),
    "empty batch": (
        {"input_ids": torch.zeros(0, 3).long()},
        ValueError,
        r"input_ids must hold at least one token, got shape \[0, 3\]",
    ),
    "no tokens": (
        {"input_ids": torch.zeros(2, 0).long()},
        ValueError,
        r"input_ids must hold at least one token, got shape \[2, 0\]",
    ),
    "token id too large": (
        {"input_ids": torch.tensor([[5, 6], [7, VOCAB_SIZE]])},
        ValueError,
        rf"sequence 1 must hold token ids in 0\.\.{VOCAB_SIZE - 1}, got {VOCAB_SIZE}",
    ),
    "negative token id": (
        {"input_ids": torch.tensor([[5, -100]])},
        ValueError,
        r"sequence 0 must hold token ids .* got -100",
    ),
    "too long": (
        {"input_ids": torch.full((1, LIMIT + 1), 5)},
        ValueError,
        r"sequence 0 must fit 64 positions, got 65 tokens\. ",
    ),
    "attention_mask of another shape": (
        {"attention_mask": torch.ones(2, 2)},
        ValueError,
        r"attention_mask must be \[1, 2\], got \[2, 2\]",
    ),
    "attention_mask of another type": (
        {"attention_mask": [[1, 1]]},
        TypeError,
        r"attention_mask must be a tensor \[B, T\], got list",
    ),
    "a sequence of padding only": (
        {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        ValueError,
        "sequence 1 must hold at least one token, got none",
    ),
    "per-token mask of another length": (
        {"paths": torch.ones(1, 3, NUM_LAYERS, dtype=torch.bool)},
        ValueError,
        r"forward: paths must be bool \[1, 2, 6\], got shape \[1, 3, 6\]",
    ),
    "per-token mask dtype": (
        {"paths": torch.ones(1, 2, NUM_LAYERS)},
        TypeError,
        r"forward: paths must be bool \[1, T, 6\], got torch.float32",
    ),
    "path for another depth": (
        {"paths": LayerPath.full(7)},
        ValueError,
        "paths must be for 6 layers, got a path for 7",
    ),
    "too many paths": (
        {"paths": [FULL] * 2},
        ValueError,
        "forward: paths must be one per sequence, got 2 for 1 sequences",
    ),
    "kv_policy with paths": ({"paths": FULL, "kv_policy": "evict"}, ValueError, "forward: kv_policy must be left out"),
    "unknown kv_policy": (
        {"paths": torch.ones(1, 2, NUM_LAYERS, dtype=torch.bool), "kv_policy": "keep"},
        ValueError,
        "forward: kv_policy must be 'propagate', 'evict' or 'share', got 'keep'",
    ),
    "unknown executor": ({"executor": "slow"}, ValueError, "executor must be 'compact' or 'reference', got 'slow'"),
    "unknown option": ({"labels": torch.ones(1, 2)}, TypeError, "unexpected keyword argument 'labels'"),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("mistake", FORWARD_MISTAKES)
def test_forward(mistake: str) -> None:
    arguments, error, message = FORWARD_MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        llm().model(**{"input_ids": torch.tensor([[5, 6]]), **arguments})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_hf().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def truncate(num_bytes: int) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:num_bytes])

    return cut


def put(name: str, value: float) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(directory / "model.safetensors")
        weights[name].view(-1)[-1] = value
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return change


CHECKPOINT_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "must hold a config.json, got none. Save the model with"),
    "config that is no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        "must hold a config, got: .*valid JSON",
    ),
    "foreign architecture": (
        change_config(model_type="llama"),
        "must hold every weight of its config, got .* missing, such as model.embed_tokens.weight",
    ),
    "unheard-of architecture": (
        change_config(model_type="frob"),
        "must hold a model of type opt, .*, got model_type 'frob'. Other",
    ),
    "no architecture": (change_config(model_type=None), "must hold a model of type opt, .*, got model_type None"),
    "heads that do not divide": (change_config(num_attention_heads=3), "must divide hidden_size 32, got 3"),
    "unknown activation": (change_config(activation_function="frob"), "activation_function must be .* got 'frob'"),
    "no layers": (change_config(num_hidden_layers=0), "num_hidden_layers must be an integer of at least 1, got 0"),
    "a size that is no number": (change_config(hidden_size="big"), "must hold a config of opt, got: .*hidden_size"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "must hold readable weights, got none of model.safetensors and pytorch_model.bin, whole or in shards",
    ),
    "weights cut in the data": (truncate(60000), "must hold readable weights, got in model.safetensors: .*incomplete"),
    "weights cut in the header": (truncate(100), "must hold readable weights, got in model.safetensors: .*header"),
    "weights of no bytes": (truncate(0), "must hold readable weights, got in model.safetensors: .*header"),
    "too few layers": (
        change_config(num_hidden_layers=7),
        r"must hold every weight of its config, got 16 missing, such as model.decoder.layers.6.fc1.bias",
    ),
    "too many layers": (
        change_config(num_hidden_layers=5),
        r"must hold the weights of its config only, got 16 more, such as model.decoder.layers.5.fc1.bias",
    ),
    "weights of another shape": (
        change_config(ffn_dim=128),
        r"model.decoder.layers.0.fc1.bias of .* must have the shape \[128\] of its config, got \[64\]",
    ),
    "NaN in a weight": (
        put("model.decoder.layers.3.self_attn.k_proj.weight", torch.nan),
        r"from_pretrained: model.decoder.layers.3.self_attn.k_proj.weight must hold finite numbers only, got NaN",
    ),
    "infinity in a bias": (
        put("model.decoder.final_layer_norm.bias", torch.inf),
        "model.decoder.final_layer_norm.bias must hold finite numbers only, got NaN or infinity",
    ),
    "NaN in the embedding": (
        put("model.decoder.embed_tokens.weight", torch.nan),
        "model.decoder.embed_tokens.weight must hold finite numbers only",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns of some of the damages before it raises
@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_checkpoint(damage: str, damaged: Path) -> None:
    inflict, message = CHECKPOINT_DAMAGES[damage]
    inflict(damaged)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        OPTForCausalLM.from_pretrained(damaged, dtype=torch.float32, backend="torch")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_numbers_too_large_for_the_dtype(damaged: Path) -> None:
    put("model.decoder.layers.0.fc1.weight", 1e30)(damaged)
    with pytest.raises(
        ValueError, match=r"layers.0.fc1.weight must hold finite .* or its numbers do not fit the dtype"
    ):
        OPTForCausalLM.from_pretrained(damaged, dtype=torch.float16, backend="torch")


def test_nan_in_a_transformers_model() -> None:
    hf_model = tiny_hf()
    with torch.no_grad():
        hf_model.model.decoder.layers[1].fc2.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^from_hf: model.decoder.layers.1.fc2.weight must hold finite numbers only"):
        OPTForCausalLM.from_hf(hf_model)


LOAD_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing directory": (
        {"directory_or_hub_id": "/nowhere/at/all"},
        FileNotFoundError,
        "'/nowhere/at/all' must be a directory, got no such directory",
    ),
    "missing directory as a path": (
        {"directory_or_hub_id": Path("nowhere")},
        FileNotFoundError,
        "'nowhere' must be a directory, got no such directory",
    ),
    "missing GGUF file": (
        {"directory_or_hub_id": "/nowhere/model.gguf"},
        FileNotFoundError,
        "'/nowhere/model.gguf' must be a GGUF file, got no such file",
    ),
    "empty name": ({"directory_or_hub_id": ""}, FileNotFoundError, "'' must be a directory, got no such directory"),
    "a file": (
        {"directory_or_hub_id": __file__},
        NotADirectoryError,
        "must be a directory or a GGUF file, got another file. Name the folder",
    ),
    "unknown hub id": (
        {"directory_or_hub_id": "nobody/nothing"},
        FileNotFoundError,
        "nobody/nothing must be a directory, or a hub id within reach.* one of opt-mini, smollm2-135m-",
    ),
    "a number": ({"directory_or_hub_id": 3}, TypeError, "the model must be a directory or a hub id, got int"),
    "dtype": ({"dtype": torch.float64}, ValueError, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    "dtype as text": ({"dtype": "float64"}, ValueError, "dtype must be float32, bfloat16 or float16, got float64"),
    "dtype of torch that is no dtype": ({"dtype": "torch.nn"}, ValueError, "dtype must be .* got torch.nn"),
    "device": ({"device": "abacus"}, ValueError, "device must be one that this machine has, got 'abacus'"),
    "a device too many": ({"device": "cuda:99"}, ValueError, "device must be one that this machine has, got 'cuda:99'"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, torch, triton, native, got 'cuda'",
    ),
    "unknown option": ({"quantize": True}, TypeError, "unexpected keyword argument 'quantize'"),
}


@pytest.mark.parametrize("mistake", LOAD_MISTAKES)
def test_load(mistake: str, checkpoint: Path) -> None:
    arguments, error, message = LOAD_MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        OPTForCausalLM.from_pretrained(**{"directory_or_hub_id": checkpoint, **arguments})
    assert "\n" not in str(caught.value)


def test_from_hf_takes_transformers_models_of_its_kind() -> None:
    with pytest.raises(
        TypeError, match=r"from_hf: the model must be a transformers model with a language.*, got Linear"
    ):
        OPTForCausalLM.from_hf(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        OPTForCausalLM.from_hf(tiny_hf(), dtype=torch.bfloat16)  # type: ignore[call-arg]


def test_llm_options(checkpoint: Path) -> None:
    for option, value in (("dtype", torch.float32), ("device", "cpu"), ("backend", "torch"), ("deterministic", True)):
        with pytest.raises(ValueError, match=f"LLM: {option} must be left out with a model object, got both"):
            LLM(llm().model, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_model_len'"):
        LLM(checkpoint, max_model_len=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"LLM: model must be .* CausalLM.from_hf converts a transformers model"):
        LLM(tiny_hf())
    with pytest.raises(
        TypeError, match="LLM: tokenizer must be a transformers tokenizer, a directory or a hub id, got"
    ):
        LLM(llm().model, tokenizer=5)  # type: ignore[arg-type]


def test_a_tokenizer_that_is_absent(damaged: Path, tmp_path: Path) -> None:
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    # Beside the model: token ids work, texts say what is missing.
    bare = LLM(damaged, backend="torch")
    assert bare.tokenizer is None and bare.generate([[5]])[0].text is None
    with pytest.raises(ValueError, match="prompt 0 must be token ids, got text and no tokenizer"):
        bare.generate(["w005"])
    # Asked for by name: an error.
    with pytest.raises(ValueError, match="must hold a tokenizer") as caught:
        LLM(damaged, tokenizer=damaged, backend="torch")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must hold a tokenizer, got: "):
        LLM(damaged, tokenizer=tmp_path / "nowhere", backend="torch")


def test_a_tokenizer_that_is_damaged(damaged: Path) -> None:
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"LLM: .* must hold a tokenizer, got: .*Pass tokenizer="):
        LLM(damaged, backend="torch")


def test_a_tokenizer_without_its_vocabulary(damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        LLM(damaged, backend="torch")


def test_a_tokenizer_of_another_model() -> None:
    """Its ids lie outside the model's vocabulary: named with the prompt, before anything runs."""
    small = LLM(OPTForCausalLM.from_hf(tiny_hf(vocab_size=50), backend="torch"), tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match=r"prompt 0 must hold token ids in 0\.\.49, got 77"):
        small.generate(["w005 w077"])


def test_saving_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError):
        llm().model.save_pretrained(tmp_path / "taken")
