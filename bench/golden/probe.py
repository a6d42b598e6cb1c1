"""What one state of the project computes, as one record: run by `golden.py` in each of two states, and compared.

Only public names that stay, so that one probe fits both. A case that raises is recorded as its error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import random
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import OPTConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM
from transformers.utils import logging

import dynskip
from dynskip import LLM, AsyncLLM, Engine, LayerPath, OPTForCausalLM, SamplingParams, controllers
from dynskip.assets import opt_mini_directory

# A name, and what computes JSON or a tensor. Tensors are kept with a hash of their bits, unless NAMES_OF_ROUNDED says
# that their last bits are not promised.
Case = tuple[str, Callable[[], Any]]
NAMES_OF_ROUNDED = re.compile("fast|reference|train")
L, VOCAB = 6, 101
# Every way in which the config of an OPT model changes what is computed.
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False},
    "projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "pre-norm-projected": {"word_embed_proj_dim": 16},
    "no-bias": {"enable_bias": False},
    "no-affine": {"layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"activation_function": "gelu"},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "three-heads": {"hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 3},
    "one-head": {"num_attention_heads": 1},
}
BACKENDS, KV_POLICIES = ("torch", "native", "triton"), ("propagate", "evict", "share")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATHS = [LayerPath.full(L), LayerPath.uniform(L, 2), LayerPath.early_exit(L, 3), LayerPath.of(L, [1, 4, 5])]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22, 23]]
GREEDY = SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=5, temperature=0.9, top_k=20, top_p=0.95, n=2, seed=3)
CONTROLLERS = ("fixed", "hidden", "mlp:8", "window:4", "attention-pool")
# What no two runs have in common.
UNREPEATABLE = re.compile(r".*(_s|_ms|seconds|bookkeeping_share|available_gib|resting_mb|peak_mb)")
WORDS = "the bread rises water house lamp keeper storm three kinds cheese write why"


def model_of(variant: str = "pre-norm", dtype: str = "float32", **options: Any) -> OPTForCausalLM:
    """A tiny model with random weights, none of them zero; native and deterministic unless told otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": L, "num_attention_heads": 2}
    more = {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0, **VARIANTS[variant]}
    model = HFOPTForCausalLM(OPTConfig(**{**sizes, **more}))
    for name, weight in model.named_parameters():
        is_norm, is_position = "norm" in name and name.endswith("weight"), "positions" in name
        scale = 1.0 if is_position else weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.2
        nn.init.normal_(weight, float(is_norm), scale)
    model = model.to(DTYPES[dtype]).eval()
    return OPTForCausalLM.from_hf(model, **{"backend": "native", "deterministic": True, **options})


def controller_of(name: str) -> Any:
    """A learned controller with random weights."""
    torch.manual_seed(5)
    controller = controllers.make_controller(name, controllers.ModelSizes(L, 32, 32))
    for parameter in controller.parameters():
        nn.init.normal_(parameter)
    return controller.eval()


def random_gate() -> Any:
    """A gate that skips about half of the layers."""
    return controllers.HiddenStateGate(torch.randn(L, 2, 32, generator=torch.Generator().manual_seed(2)))


def random_mask(num_seqs: int, num_tokens: int) -> Tensor:
    """[B, T, L], bool: which layers each token runs."""
    return torch.rand(num_seqs, num_tokens, L, generator=torch.Generator().manual_seed(1)) < 0.6


def fixed_costs(num_layers: int) -> Any:
    """Costs that are the same everywhere; their class is found by its name, wherever its module has moved."""
    folder = Path(dynskip.__file__).parent
    (home,) = (path for path in folder.rglob("*.py") if re.search(r"^class StepCosts\b", path.read_text("utf-8"), re.M))
    module = importlib.import_module(".".join(("dynskip", *home.relative_to(folder).with_suffix("").parts)))
    return dataclasses.replace(module.StepCosts.h200(), num_layers=num_layers)


def output(result: Any) -> dict[str, Any]:
    """What a request became, without times; raises what ended it."""
    if getattr(result, "error", None) is not None:
        raise result.error
    samples = [(sample.token_ids, sample.finish_reason, sample.logprobs) for sample in result.samples]
    return {"samples": samples, "path": str(result.path), "text": getattr(result, "text", None)}


def generate(model: OPTForCausalLM, paths: Any, params: SamplingParams = GREEDY, **options: Any) -> list[Any]:
    """What the prompts become."""
    return [output(each) for each in LLM(model).generate(PROMPTS, params, paths, **options)]


def repeatable(value: Any) -> Any:
    """``value`` without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: repeatable(each) for key, each in value.items() if not UNREPEATABLE.fullmatch(str(key))}
    return [repeatable(each) for each in value] if isinstance(value, list | tuple) else value


def forward(quick: bool) -> Iterator[Case]:
    """Logits: every variant, backend and dtype, fast and deterministic, and the reference executor."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 1, 12, 13, 14, 15], [16, 17, 18, 19, 1, 1], [20, 1, 1, 1, 1, 1]])
    keep = (ids != 1).long()

    def logits(model: OPTForCausalLM, paths: Any = PATHS, **options: Any) -> Tensor:
        return model(ids, keep, paths, **options).logits

    for variant in VARIANTS:
        for backend in BACKENDS:
            for dtype in DTYPES:
                # Triton's interpreter takes seconds where others take none, and multiplies bfloat16 wrongly.
                slow = variant not in ("pre-norm", "projected", "three-heads") or dtype != "float32"
                if (backend == "triton" and (quick or slow)) or (quick and dtype == "float16"):
                    continue
                for mode in ("deterministic", "fast"):
                    model = model_of(variant, dtype, backend=backend, deterministic=mode == "deterministic")
                    yield f"logits/{variant}/{backend}/{dtype}/{mode}", partial(logits, model)
        yield f"logits/{variant}/reference", partial(logits, model_of(variant), executor="reference")
    for policy in KV_POLICIES:
        for backend in BACKENDS[:2]:
            masked = partial(logits, model_of(backend=backend), random_mask(4, 6), kv_policy=policy)
            yield f"logits/per token/{policy}/{backend}", masked
    states = partial(model_of(), ids, keep, PATHS, output_hidden_states=True)
    yield "logits/hidden states", lambda: torch.stack(states().hidden_states)


def generation(quick: bool) -> Iterator[Case]:
    """Closed batches: greedy and sampled, along paths and masks, by what skipped layers store, under controllers."""
    for backend in BACKENDS:
        for variant in VARIANTS:
            for dtype in ("float32", "bfloat16"):
                slow = quick or variant not in ("pre-norm", "three-heads") or dtype != "float32"
                if backend == "triton" and slow:
                    continue
                model, name = model_of(variant, dtype, backend=backend), f"generate/{variant}/{backend}/{dtype}"
                yield f"{name}/greedy", partial(generate, model, PATHS)
                if backend != "triton":
                    yield f"{name}/sampled", partial(generate, model, PATHS, SAMPLED)
    for backend in BACKENDS[:2]:
        model = model_of(backend=backend)
        for policy in KV_POLICIES:
            for depth in ("path", "full"):
                run = partial(generate, model, random_mask(4, 12), kv_policy=policy, prompt_depth=depth)
                yield f"generate/per token/{policy}/{depth}/{backend}", run
                yield f"generate/per token/{policy}/{depth}/{backend}/reference", partial(run, executor="reference")
    model = model_of()

    def counted(controller: Any) -> Any:
        counting = controllers.CountingController(controller, L)
        return generate(model, counting), counting.num_asked, counting.num_run

    yield "controller/static", partial(generate, model, controllers.StaticController(PATHS))
    yield "controller/gate", partial(counted, random_gate())
    for name in CONTROLLERS:
        is_per_token = hasattr(controller_of(name), "active")
        yield f"controller/{name}", partial(counted if is_per_token else partial(generate, model), controller_of(name))


def serve(policy: str, deterministic: bool, backend: str, kv_entries: int | None) -> dict[str, Any]:
    """Requests that come and go: per step the tokens by request and what the engine holds, and all outputs.

    What is drawn stands apart, under "sampled", and decides nothing else: such outputs have known lengths, and those of
    a gate are greedy.
    """
    model = model_of(backend=backend, deterministic=deterministic)
    kv_bytes = None if kv_entries is None else kv_entries * model.kv_entry_bytes
    options: dict[str, Any] = {"batch": 3, "max_prefill_tokens": 8, "max_context_len": 40, "kv_bytes": kv_bytes}
    if policy == "cohort":
        options |= {"costs": fixed_costs(L), "pool": 6, "max_wait": 12}
    draw = random.Random(0)
    shared = [draw.randrange(4, VOCAB) for _ in range(9)]
    steps: list[Any] = []
    tokens: list[Any] = []
    drawn: list[Any] = []
    is_drawn = {index: index % 2 == 1 and index != 7 for index in range(12)}
    ended: dict[Any, Any] = {}
    sampled: dict[str, Any] = {"tokens": [], "ended": {}}
    with Engine(model, policy=policy, clock=lambda: len(steps), **options) as engine:
        requests = iter(range(12))
        while engine.has_unfinished or len(steps) < 20:
            for _, index in zip(range(len(steps) % 2 if steps else 5), requests, strict=False):
                prompt = (shared if index % 3 == 0 else []) + [draw.randrange(4, VOCAB) for _ in range(1 + index % 4)]
                n = 2 if index == 4 else 1
                length, heat = 3 + index % 5, 0.8 * is_drawn[index]
                common = {"seed": index, "n": n, "logprobs": 1, "ignore_eos": is_drawn[index]}
                params = SamplingParams(max_tokens=length, temperature=heat, **common)
                path: Any = {5: random_mask(1, 40)[0], 7: random_gate()}.get(index, PATHS[index % 3])
                stores = {5: "evict", 7: "propagate"}.get(index)
                into = drawn if is_drawn[index] else tokens
                note = {"request_id": index, "on_token": lambda *token, into=into: into.append(token)}
                engine.add_request(prompt, params, path, kv_policy=stores, **note)
            if len(steps) == 2:
                ended["aborted"] = output(engine.abort(4))
            for each in engine.step():
                known, by_noise = output(each), sampled["ended"]
                if is_drawn[each.request_id]:
                    by_noise[each.request_id], known = known, {}
                ended[each.request_id] = {**known, "preempted": each.num_preemptions}
            steps.append({"tokens": list(tokens), **repeatable(engine.stats().line())})
            sampled["tokens"].append(list(drawn))
            tokens.clear()
            drawn.clear()
    return {"steps": steps, "ended": ended, "sampled": sampled}


def engine(quick: bool) -> Iterator[Case]:
    """Who steps, who is preempted, what is held: each policy with much memory and with little."""
    for backend in BACKENDS[1 if quick else 0 : 2]:
        for policy in ("lockstep", "by_path", "cohort"):
            for mode in ("deterministic", "fast"):
                for entries in (None, 130):
                    run = partial(serve, policy, mode == "deterministic", backend, entries)
                    yield f"engine/{policy}/{backend}/{mode}/{entries}", run

    async def texts() -> list[Any]:
        path, params = LayerPath.uniform(24, 4), SamplingParams(max_tokens=8)
        async with AsyncLLM(LLM(deterministic=True), costs=fixed_costs(24)) as served:
            whole = served.generate("Why does bread rise?", params, path)
            pieces = [piece async for piece in served.stream("Name three cheeses.", params, path)]
            return [output(await whole), "".join(piece.text for piece in pieces)]

    yield "engine/async", lambda: asyncio.run(texts())


def command(*arguments: object) -> str:
    """What `dynskip` prints."""
    printed, given = io.StringIO(), sys.argv
    sys.argv = ["dynskip", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("dynskip", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit status {end.code}: {printed.getvalue()[-400:]}") from end
    finally:
        sys.argv = given
    return printed.getvalue()


def lines(*arguments: object) -> Any:
    """The JSON lines that `dynskip` prints."""
    return [json.loads(line) for line in command(*arguments, "--json").splitlines()]


def commands(quick: bool) -> Iterator[Case]:
    """What the commands print as JSON."""
    generate = partial(lines, "generate", "--deterministic", "--quiet", "--max-tokens", 12)
    prompts = ("The lighthouse keeper", "A recipe for bread", "--path", "full", "--path", "uniform:8")
    yield "command/generate", partial(generate, *prompts)
    yield "command/generate --chat", partial(generate, "--chat", "The lighthouse keeper")
    sampled = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 1, "--n", 3)
    yield "command/generate --n 3", partial(generate, *prompts, *sampled)
    yield "command/info", lambda: repeatable(lines("info", "--model", "opt-mini"))
    simulate = partial(lines, "simulate", "--requests", 128)
    yield "command/simulate", simulate
    more = ("--arrival", "poisson:2000", "--engines", 2, "--kv-slots", 4000, "--output", "fixed:9", "--seed", 3)
    yield "command/simulate --engines 2", partial(simulate, *more)
    which = ("--dtype", "float32") if quick else ()
    for backend in BACKENDS[:2]:
        yield f"command/validate {backend}", partial(lines, "validate", "--quiet", "--backend", backend, *which)


def evaluate(old: Path, folder: Path) -> str:
    """Run or finish a sweep of seconds in ``folder``."""
    few = ("--prompts", 6, "--shard-size", 6, "--budgets", "4,8", "--candidates", 4, "--max-tokens", 4, "--seeds", 1)
    timed = ("--resamples", 20, "--timed-batch", 2, "--timed-rounds", 1, "--threads", 1, "--quiet")
    model = ("--model", old / "opt-mini", "--data", old / "data.json")
    return command("eval", "static", *model, "--out", folder, *few, *timed)


def item_lines(run: Path) -> list[dict[str, Any]]:
    """The finished items of a run by their keys, whole, as either state keeps them: in one file, or token ids apart."""
    found: dict[str, dict[str, Any]] = {}
    for path in [run / "items.jsonl", *sorted((run / "items").glob("*.jsonl"))]:
        if path.exists() and not path.name.endswith(".failed.jsonl"):
            for line in map(json.loads, path.read_text("utf-8").splitlines()):
                found[line["key"]] = joined(found.get(line["key"], {}), line)
    return [found[key] for key in sorted(found)]


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, and at each name that both have the join of what they have there."""
    both = one | other
    shared = [name for name in one if isinstance(one[name], dict) and name in other]
    return both | {name: joined(one[name], other[name]) for name in shared}


def write_artefacts(folder: Path, quick: bool) -> None:
    """What the new state has to read: checkpoints, controllers, and unless ``quick`` costs and a sweep."""
    draw = random.Random(0)
    rows = [{name: " ".join(draw.choices(WORDS.split(), k=8)) for name in ("instruction", "output")} for _ in range(80)]
    rows = [{**row, "instruction": f"{row['instruction']} {index}", "input": ""} for index, row in enumerate(rows)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    for variant in ("pre-norm", "projected", "untied"):
        model_of(variant).save_pretrained(folder / "checkpoints" / variant)
    for name in CONTROLLERS:
        controllers.save_controller(controller_of(name), name, folder / "controllers" / name.replace(":", "-"))
    shutil.copytree(opt_mini_directory(), folder / "opt-mini")
    if not quick:
        tiny = ("--rows", 2, "--prompt-len", 4, "--context", 8, "--prefill", 8, "--rounds", 1, "--quiet")
        command("calibrate", "--model", "opt-mini", *tiny)
        evaluate(folder, folder / "eval")


def artefacts(old: Path, out: Path, quick: bool) -> Iterator[Case]:
    """What becomes of the artefacts of the ``old`` state, and what is written now, in ``out``."""
    ids = torch.tensor(PROMPTS[0])[None]
    for saved in sorted((old / "checkpoints").iterdir()):
        name, options = f"artefact/checkpoint/{saved.name}", {"dtype": torch.float32, "deterministic": True}
        load = partial(OPTForCausalLM.from_pretrained, saved, **options)
        yield name, lambda load=load: load()(ids, paths=PATHS[1]).logits
        model_of(saved.name).save_pretrained(out / saved.name)
        yield f"{name}/config", partial(read_json, out / saved.name / "config.json")
        for key, tensor in load_file(out / saved.name / "model.safetensors").items():
            yield f"{name}/{key}", partial(torch.clone, tensor)
    for saved in sorted((old / "controllers").iterdir()):
        for sample in (False, True):
            load = partial(controllers.load_controller, saved, sample=sample, seed=1)
            yield f"artefact/controller/{saved.name}/{sample}", lambda load=load: generate(model_of(), load())
    if quick:
        return

    def known_costs() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error", dynskip.UnmeasuredCostsWarning)
            Engine(LLM().model, kv_bytes=2**20).close()
        return "found"

    def finished() -> Any:
        shutil.copytree(old / "eval", out / "eval old")
        (out / "eval old" / "summary.json").unlink()
        evaluate(old, out / "eval old")
        command("report", out / "eval old")
        summary = read_json(out / "eval old" / "summary.json")
        return {section: numbers for section, numbers in summary.items() if section != "conditions"}

    def begun() -> Any:
        evaluate(old, out / "eval new")
        lines = item_lines(out / "eval new")
        return [[each["item"], each["result"]] for each in lines if each["item"]["task"] == "generate"]

    (costs,) = (old / "cache").rglob("*.json")
    yield "artefact/costs/engine", known_costs
    yield "artefact/costs/simulate", partial(lines, "simulate", "--requests", 64, "--device", costs)
    yield "artefact/eval/old", finished
    yield "artefact/eval/new", begun
    few = ("--batch-size", 4, "--micro-batch", 4, "--max-length", 64, "--validation-rows", 4, "--template", "short")
    what = ("--controller", "hidden", "--model", old / "opt-mini", "--data", old / "data.json", "--out", out / "train")
    yield "artefact/train", lambda: bool(command("train", *what, *few, "--steps", "controller=2", "--quiet"))
    for key in ("weight", "bias"):
        yield f"artefact/train/{key}", lambda key=key: load_file(out / "train" / "controller.safetensors")[key]


def read_json(path: Path) -> Any:
    """What a file of JSON holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def record(cases: Iterable[Case], out: Path, root: Path) -> None:
    """Leave what the cases compute in ``out``: numbers and texts as JSON, tensors as they are, by name."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, function in cases:
        try:
            result = function()
        except Exception as error:  # a difference like any other, and no reason to see fewer of them
            result = {"error": f"{type(error).__name__}: {error}"}
        if not isinstance(result, Tensor):
            values[name] = result
            continue
        tensors[name] = result = result.detach().contiguous().clone()
        if not NAMES_OF_ROUNDED.search(name):
            bits = result.flatten().view(torch.uint8).numpy().tobytes()
            values[f"{name} bits"] = hashlib.sha256(bits).hexdigest()[:16]
    save_file(tensors, out / "record.safetensors")
    text = json.dumps(values, default=list).replace(str(out), "OUT").replace(str(root), "ROOT")
    (out / "record.json").write_text(text, encoding="utf-8")


def main() -> int:
    """Write artefacts, or a record of them and of all else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="of the state that must be imported")
    parser.add_argument("--artefacts", type=Path, required=True, help="of the old state")
    parser.add_argument("--out", type=Path, help="for the record; without it the artefacts are written")
    parser.add_argument("--only", help="cases whose section begins with that")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    root = args.root.resolve()
    assert Path(dynskip.__file__).resolve().is_relative_to(root), f"{dynskip.__file__} is another state than {root}"
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.out is None:
        write_artefacts(args.artefacts, args.quick)
        return 0
    sections = [section(args.quick) for section in (forward, generation, engine, commands)]
    sections.append(artefacts(args.artefacts, args.out, args.quick))
    chosen = [each for each in sections if args.only is None or each.__name__.startswith(args.only)]
    record((case for section in chosen for case in section), args.out, root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
