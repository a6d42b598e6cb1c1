"""``dynskip info``: what this machine and this installation can do."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynskip.cli.options import DTYPES, UserError, add_adapter_option, torch_dtype
from dynskip.host import cpu_features, cpu_model, package_version
from dynskip.kernels import switches
from dynskip.version import __version__

if TYPE_CHECKING:
    from dynskip.models.config import DecoderConfig

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
HELP = "what this machine and this installation can do"
DESCRIPTION = "Show versions, devices, backends and why one is not there, and the shipped model."
EXAMPLES = """examples:
  dynskip info           versions, devices, backends and why one is not there, the shipped model
  dynskip info --json    the same for a program
  dynskip info --model facebook/opt-1.3b    also what a checkpoint takes in memory, at rest and while loading
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``info``."""
    parser.add_argument(
        "--model", metavar="NAME", help="also load this folder, GGUF file, hub id or name and tell what memory it takes"
    )
    add_adapter_option(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of its weights (default: bfloat16)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit status 0."""
    if args.adapter is not None and args.model is None:
        raise UserError("--adapter must come with --model, the base that it is merged into")
    report = {
        "dynskip": {"version": __version__, "location": str(Path(__file__).parents[1])},
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) or "not installed" for name in _PACKAGES},
        },
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": _backends(),
        "switches": switches.describe(),
        "opt-mini": _shipped_model(),
    }
    if args.model is not None:
        report["model"] = _loaded_model(args.model, args.dtype, args.adapter)
    if args.json:
        print(json.dumps(report))
    else:
        _print_table(report)
    return 0


def _cpu() -> dict[str, Any]:
    import psutil
    import torch

    from dynskip.execution.cgroup import cgroup_memory
    from dynskip.execution.kv_cache import available_bytes

    memory = psutil.virtual_memory()
    group = cgroup_memory(machine_bytes=memory.total)
    return {
        "model": cpu_model(),
        "features": cpu_features(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": psutil.cpu_count(logical=False),
        "num_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(available_bytes(torch.device("cpu")) / 2**30, 1),
        "cgroup_limit_gib": None if group is None else round(group.limit_bytes / 2**30, 1),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {
            "device": f"cuda:{index}",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        for index, properties in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]


def _backends() -> dict[str, dict[str, str | None]]:
    """Per device, per backend: None if it runs there, else why not."""
    import torch

    from dynskip.ops.backends import available_backends

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: available_backends(device) for device in devices}


def _shipped_model() -> dict[str, Any]:
    from safetensors import safe_open

    from dynskip.assets import opt_mini_directory
    from dynskip.models.registry import read_decoder_config

    try:
        directory = opt_mini_directory()
    except FileNotFoundError as error:
        return {"missing": str(error)}
    config = read_decoder_config(str(directory))
    files = sorted(directory.glob("*.safetensors"))
    num_parameters = 0
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # a safe_open is no mapping and cannot be iterated
                num_parameters += math.prod(tensors.get_slice(key).get_shape())
    return {
        "directory": str(directory),
        **_sizes(config),
        "num_parameters": num_parameters,
        "file_mb": round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "weights_mb": round(num_parameters * 2 / 1e6, 1),
        "kv_bytes_per_token_and_layer": config.kv_entry_size * 2,
    }


def _sizes(config: DecoderConfig) -> dict[str, Any]:
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "vocab_size", "max_positions")
    return {name: getattr(config, name) for name in ("architecture", *sizes)}


def _loaded_model(name: str, dtype: str, adapter: str | None) -> dict[str, Any]:
    """What a checkpoint takes once loaded, and what this process held before and at its peak."""
    import psutil

    from dynskip.causal_lm import CausalLM
    from dynskip.execution.compact import CompactExecutor

    weights_dtype = torch_dtype(dtype)
    assert weights_dtype is not None, "--dtype has a default"
    before_bytes = psutil.Process().memory_info().rss
    model = CausalLM.from_pretrained(name, dtype=weights_dtype, adapter=adapter)
    memory, executor = model.memory, model.executor()
    assert isinstance(executor, CompactExecutor), "the default"
    return {
        "name": name,
        "adapter": getattr(model.config, "adapter", None),
        "dtype": dtype,
        **_sizes(model.decoder_config),
        "kv_bytes_per_token_and_layer": model.kv_entry_bytes,
        "prompt_attention": executor.prompt_attention(),
        "decode_attention": executor.decode_attention(),
        "matrices_mb": round(memory.matrix_bytes / 1e6, 1),
        "embedding_and_norms_mb": round(memory.other_bytes / 1e6, 1),
        "resting_mb": round((memory.resting_bytes - before_bytes) / 1e6, 1),
        "peak_mb": round((memory.peak_bytes - before_bytes) / 1e6, 1),
    }


def _described(sizes: dict[str, Any]) -> str:
    shared = f" sharing {sizes['num_kv_heads']} of keys and values"
    return (
        f"{sizes['architecture']}, {sizes['num_layers']} layers, hidden {sizes['hidden_size']}, "
        f"{sizes['num_heads']} heads{shared if sizes['num_kv_heads'] != sizes['num_heads'] else ''}, "
        f"vocabulary {sizes['vocab_size']}, {sizes['max_positions']} positions"
    )


def _print_table(report: dict[str, Any]) -> None:
    cpu, model = report["cpu"], report["opt-mini"]
    limit = "" if cpu["cgroup_limit_gib"] is None else f", of which a cgroup allows {cpu['cgroup_limit_gib']} GiB"
    rows = [("dynskip", f"{report['dynskip']['version']} in {report['dynskip']['location']}")]
    rows += list(report["versions"].items())
    rows += [
        ("cpu", f"{cpu['model']}, {cpu['num_cores']} cores, {cpu['num_usable']} usable, {cpu['num_threads']} threads"),
        ("features", f"{' '.join(cpu['features']) or 'none known'} (torch uses {cpu['torch_capability']})"),
        ("memory", f"{cpu['memory_gib']} GiB{limit}, {cpu['available_gib']} GiB available"),
    ]
    rows += [
        (gpu["device"], f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
        for gpu in report["gpus"]
    ] or [("gpu", "none that torch can use")]
    rows += list(report["switches"].items())
    for device, reasons in report["backends"].items():
        rows += [(f"{name} on {device}", "yes" if why is None else f"no: {why}") for name, why in reasons.items()]
    if "missing" in model:
        rows.append(("opt-mini", model["missing"]))
    else:
        shape = f"{_described(model)}, {model['num_parameters'] / 1e6:.1f} M parameters"
        memory = (
            f"{model['weights_mb']} MB of weights in bfloat16 ({model['file_mb']} MB on disk), "
            f"{model['kv_bytes_per_token_and_layer']} bytes of KV per token and executed layer"
        )
        rows += [("opt-mini", shape), ("its memory", memory)]
    if "model" in report:
        loaded = report["model"]
        weights = (
            f"{loaded['matrices_mb']} MB of matrices, {loaded['embedding_and_norms_mb']} MB of embedding and norms"
        )
        rows += [
            ("loaded", f"{loaded['name']} in {loaded['dtype']}: {weights}"),
            *([] if loaded["adapter"] is None else [("", f"merged with the adapter in {loaded['adapter']}")]),
            ("", _described(loaded)),
            ("", f"{loaded['kv_bytes_per_token_and_layer']} bytes of KV per token and executed layer"),
            ("attention", f"of prompts {loaded['prompt_attention']}; of decode {loaded['decode_attention']}"),
            ("", f"the process grew by {loaded['resting_mb']} MB, at its peak by {loaded['peak_mb']} MB"),
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
