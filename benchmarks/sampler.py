"""vLLM against transformers' generate, the push of weights against a copy of them, and sampling beside the learner.

Runs in a process of its own with one thread, as the learner and the sampler have one core each: `python -m benchmarks`
starts it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PrinterCallback

from benchmarks.harness import Measured, Result, compare, quiet, speed
from benchmarks.shapes import dtype_name, in_dtype, precisions, save, smollm2_shape
from components.common.core.errors import UserError
from components.common.generation.hf import HFSampler
from components.common.generation.protocol import SamplingSettings, make_canary
from components.sapo.ema import copy_weights, frozen_copy, weights_of

SETTINGS = SamplingSettings(temperature=0.7, top_k=50, top_p=0.95, stop_ids=frozenset({1}))
NEW_TOKENS = 64
PROMPTS, SHORTEST, LONGEST = 8, 150, 400  # as SAPO has them; lengths in tokens


def sampler(quick: bool, rounds: int) -> list[Result]:
    """All cases of this file, from the process that measures them; none where vLLM is not installed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.sampler", *(["--quick"] if quick else [])]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Result(**fields) for fields in json.loads(printed.splitlines()[-1])]


def main(quick: bool) -> list[Result]:
    from components.common.generation.vllm import VLLMSampler, import_vllm

    try:
        import_vllm()
    except UserError as error:
        print(f"the sampler's cases are left out: {error}", file=sys.stderr)
        return []
    dtype = precisions(quick)[-1]  # as engines run here by default
    model = in_dtype(smollm2_shape(layers=4 if quick else 30), dtype)
    with tempfile.TemporaryDirectory() as directory:
        save(model, directory)
        vllm = VLLMSampler(directory, SETTINGS, max_model_len=512, dtype=dtype_name(dtype))
        results = [*generation(model, vllm), *push(model, vllm, quick)]
        vllm.close()
    if not quick:  # every run of it starts an engine
        with tempfile.TemporaryDirectory() as directory:
            save(smollm2_shape(layers=8), directory)
            results += overlap(directory)
    return results


def generation(model: LlamaForCausalLM, vllm: Any) -> list[Result]:
    """Tokens a second, as milliseconds for the same tokens."""
    hf, random = HFSampler(model, SETTINGS, pad_id=0), np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, PROMPTS)
    prompts = [random.integers(5, 1000, int(length)).tolist() for length in lengths]

    def go(engine: Any) -> None:
        engine.generate(prompts, [NEW_TOKENS] * PROMPTS, list(range(PROMPTS)))

    def fresh() -> None:
        vllm._llm.reset_prefix_cache()  # as after a push: every prompt is computed
        go(vllm)

    theirs, ours = compare([lambda: go(hf), fresh], 1)
    setting = (
        f"{PROMPTS} x {NEW_TOKENS} tokens after prompts of {SHORTEST}-{LONGEST}, {dtype_name(model.dtype)}, 1 thread"
    )
    return [speed("vLLM generation", setting, "hf sampler", theirs, ours)]


def push(model: LlamaForCausalLM, vllm: Any, quick: bool) -> list[Result]:
    weights, twin = weights_of(model), weights_of(frozen_copy(model))
    canary = make_canary(model, list(range(5, 21)))
    memcpy, ours = compare(
        [lambda: copy_weights(weights, twin), lambda: vllm.load(model.named_parameters(), 1, canary)], 3 if quick else 7
    )
    setting = f"{model.num_parameters() / 1e6:.0f}M parameters, {dtype_name(model.dtype)}, 1 thread; with its proof"
    return [speed("vLLM weight push", setting, "a copy of the weights", memcpy, ours)]


def overlap(directory: str) -> list[Result]:
    """Steps of SAPOTrainer with vLLM: sampling before each step against sampling beside it."""
    from components.sapo.config import SAPOConfig
    from components.sapo.trainer import SAPOTrainer

    random = np.random.default_rng(0)
    rows = [
        {
            "id": str(i),
            "prompt_ids": random.integers(5, 1000, 200).tolist(),
            "chosen_ids": [*random.integers(5, 1000, 150).tolist(), 1],
        }
        for i in range(16)
    ]
    options: dict[str, Any] = {
        "loss_type": "dpo",
        "segment_length": NEW_TOKENS,
        "max_new_tokens": NEW_TOKENS,
        "max_length": 512,
    }
    options |= {"sampler": "vllm", "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 2, "responses_per_prompt": 4, "disable_tqdm": True, "logging_steps": 1}
    options |= {"max_steps": 4}
    taken: list[Measured] = []
    share = 0.0
    for schedule in ("sync", "overlap"):
        args = SAPOConfig(output_dir=f"{directory}/{schedule}", schedule=schedule, **options)
        trainer = SAPOTrainer(directory, args, rows)
        trainer.remove_callback(PrinterCallback)
        runtime = trainer.train().metrics["train_runtime"]
        taken.append(Measured(runtime / args.max_steps, 0.0))
        trainer.sampler.close()
        if schedule == "sync":
            sampled = [e["seconds/sample"] for e in trainer.state.log_history if "seconds/sample" in e]
            share = statistics.mean(sampled) * args.max_steps / runtime
    sync, beside = taken
    setting = f"8 layers, 2 pairs, 8 x {NEW_TOKENS} tokens sampled ({share:.0%} of a sync step), 1 thread each"
    return [speed("SAPO step, overlap", setting, "sync", sync, beside)]


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    print(json.dumps([asdict(result) for result in main("--quick" in sys.argv)]))
