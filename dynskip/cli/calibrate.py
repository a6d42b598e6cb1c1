"""``dynskip calibrate``: what steps take on this device, measured and kept for the scheduler and ``simulate``."""

from __future__ import annotations

import argparse
from typing import Any

from dynskip.cli.options import (
    UserError,
    add_model_options,
    add_number,
    check_writable,
    file_path,
    load_llm,
    set_threads,
    show_progress,
    torch_device,
    torch_dtype,
)
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES, get_shape

HELP = "measure what a step costs here, for the scheduler"
DESCRIPTION = "Time decode steps and prefills by rows, and keep the table for this device and model shape."
EXAMPLES = """examples:
  dynskip calibrate                                     OPT-1.3B's shapes, random weights: minutes, and 5 GiB
  dynskip calibrate --model opt-mini                    the model shipped with dynskip: seconds
  dynskip calibrate --shape opt-0.2b-24 --out costs.json
  dynskip calibrate --shape llama-3.2-1b                another architecture
  dynskip calibrate --model runs/base --rows 32 --context 64
  dynskip simulate --device this                        what the result is for
"""
# Sequences whose guesses are timed; beyond them guesses seldom pay on a CPU.
_DRAFTED_BATCHES = (1, 2, 4, 8, 16)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``calibrate``."""
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        help=f"random weights of that shape (default: {DEFAULT_SHAPE}, unless --model is given)",
    )
    add_number(parser, "--rows", "N", 1, 1024, 64, "most rows of a decode step")
    add_number(parser, "--prompt-len", "T", 1, 2048, 32, "tokens of a prompt")
    fits = "tokens cached, to time reads of them (default: 512, or what fits)"
    add_number(parser, "--context", "S", 1, 2048, None, fits)
    add_number(parser, "--prefill", "T", 1, 2**16, 512, "most tokens of a prefill")
    add_number(parser, "--rounds", "N", 1, 1000, 5, "samples of each time")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="also write the table there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_model_options(parser, model_default="random weights of --shape")


def run(args: argparse.Namespace) -> int:
    """Measure, keep and print."""
    set_threads(args.threads)
    if args.model is not None and args.shape is not None:
        raise UserError("--model and --shape exclude each other: --shape makes a model with random weights")
    if args.model is None and args.adapter is not None:
        raise UserError("--adapter must come with --model: --shape makes a model with random weights")
    progress = show_progress(args.quiet)

    from tqdm import tqdm

    from dynskip.costs.store import cached_path, cost_keys
    from dynskip.measure import machine
    from dynskip.measure.calibration import (
        add_draft_costs,
        add_stream_costs,
        check_context,
        measure_step_costs,
        num_new_tokens,
    )

    if args.model is None:  # random weights take their time
        positions = get_shape(args.shape or DEFAULT_SHAPE).max_positions
        check_context(positions, args.prompt_len, args.context or 1, args.rounds)
    model = _model(args)
    if args.context is None:
        room = model.decoder_config.max_positions - args.prompt_len - num_new_tokens(args.rounds)
        args.context = max(1, min(512, room))
    device, shape = cost_keys(model)
    written = [cached_path(device, shape), *([args.out] if args.out is not None else [])]
    for path in written:  # before the minutes that it takes to measure
        check_writable(path, "Set DYNSKIP_CACHE to a folder of your own, and --out to a file in one.")
    shape_name = args.shape or args.model or DEFAULT_SHAPE
    conditions = {**machine.describe(), "shape": shape_name, "backend": model.backend.name}
    with tqdm(desc="steps", leave=False, disable=not progress) as bar:

        def on_call(_: str) -> None:
            bar.update()

        sizes = (args.rows, args.prompt_len, args.context, args.prefill, args.rounds)
        costs = measure_step_costs(model, device, *sizes, conditions, on_call)
        bar.set_description("streams")
        batches = sorted({max(args.rows // 2, 1), args.rows})
        costs = add_stream_costs(model, costs, batches, args.prompt_len, args.prefill, on_call)
        bar.set_description("drafts")
        costs = add_draft_costs(model, costs, _DRAFTED_BATCHES, args.prompt_len, on_call)
    print(f"{device}, {shape}")
    print(f"{'rows':>6}{'layer ms':>12}{'rest ms':>12}{'full depth ms':>16}")
    layer, rest = costs.decode.layer, costs.decode.head
    for rows, layer_ms, rest_ms in zip(layer.num_rows, layer.ms, rest.ms, strict=True):
        print(f"{rows:>6}{layer_ms:>12.4f}{rest_ms:>12.4f}{costs.num_layers * layer_ms + rest_ms:>16.3f}")
    print(f"prefill  {'tokens':>6}{'layer ms':>12}")
    for tokens, layer_ms in zip(costs.prefill.layer.num_rows, costs.prefill.layer.ms, strict=True):
        print(f"{tokens:>15}{layer_ms:>12.4f}")
    print(f"a key-value entry read: {costs.decode.kv_ms_per_entry * 1e6:.1f} ns")
    print(
        f"in a stream a step takes {costs.step_ms:.4f} ms besides, and each row {costs.step_row_ms:.4f} ms; a prefill "
        f"{costs.prefill_step_ms:.4f} ms"
    )
    for num_seqs, (guess, verify) in costs.draft_ratios.items():
        print(f"guesses of {num_seqs} take {guess:.2f} times what layers let expect, their verifications {verify:.2f}")
    for path in written:
        costs.write(path)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _model(args: argparse.Namespace) -> Any:
    """The model that was asked for, or one with random weights of a shape."""
    if args.model is not None:
        return load_llm(args).model
    from dynskip.causal_lm import CausalLM
    from dynskip.measure.random_models import hf_config, random_hf_model

    dtype, device = torch_dtype(args.dtype or "bfloat16"), torch_device(args.device or "cpu")
    assert dtype is not None and device is not None, "both are named"
    config = hf_config(args.shape or DEFAULT_SHAPE)
    hf_model = random_hf_model(config, dtype=dtype, device=device)
    return CausalLM.from_hf(hf_model, backend=args.backend or "auto", deterministic=args.deterministic)
