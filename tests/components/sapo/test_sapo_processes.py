"""Two processes (gloo) do what one does: under DDP, ZeRO-2, ZeRO-3 and FSDP2, for DPO and ORPO, interrupted or not.

What is compared comes from `processes.py`, which a launcher runs. Both take four pairs a step in two micro-batches. Weights of
order 1 differ by 2e-6 at most, and log-probs of order 10 by 1e-4: another order of additions rounds differently. Under DDP the
order is the same, and so are the bits. Tokens, draws and counts are equal always.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from components.common.core.errors import UserError
from components.common.generation.vllm import import_vllm
from components.common.models.loading import load_model, load_tokenizer

pytestmark = pytest.mark.slow

try:
    import_vllm()
    NO_VLLM = ""
except UserError as error:
    NO_VLLM = str(error)

ROOT = Path(__file__).parents[3]
PARALLELISM = ["ddp", "zero2", "zero3", "fsdp2"]
MEASURED = ("seconds", "per_second", "memory/", "train_", "total_flos")  # of the machine, not of the run


@pytest.fixture(scope="module")
def model(tmp_path_factory, micro_model) -> Path:
    """A micro model with logits so far apart that rounding changes no token."""
    path, tokenizer = tmp_path_factory.mktemp("processes") / "model", load_tokenizer(str(micro_model))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def launch(model, chat_data, tmp_path_factory):
    def start(processes: int, parallelism: str, *scenarios: str) -> Path:
        """Runs scenarios one after the other; returns the directory with what they ended with."""
        output = tmp_path_factory.mktemp(f"{parallelism}-{processes}")
        launcher = (
            ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
        )
        command = [sys.executable, "-m", *launcher, "tests.components.sapo.processes"]
        command += [parallelism, str(model), str(chat_data), str(output), *scenarios]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return output

    return start


@pytest.fixture(scope="module")
def alone(launch) -> Path:
    """One process."""
    return launch(1, "ddp", "dpo", "orpo")


@pytest.fixture(scope="module", params=PARALLELISM)
def together(request, launch) -> tuple[str, Path]:
    """Two processes."""
    return request.param, launch(2, request.param, "dpo", "orpo", "dpo@dpo", "orpo@orpo")


def assert_alike(one: Path, other: Path, atol: float) -> None:
    mine, theirs = load_file(f"{one}.safetensors"), load_file(f"{other}.safetensors")
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    a, b = (json.loads(Path(f"{place}.json").read_text()) for place in (one, other))
    assert a["buffer"] == b["buffer"]
    for entry, expected in zip(*(map(of_the_run, run["log"]) for run in (a, b)), strict=True):
        assert entry == pytest.approx(expected, abs=50 * atol + 1e-9)


def of_the_run(entry: dict) -> dict:
    """A log entry without what was measured of the machine."""
    return {name: value for name, value in entry.items() if not any(part in name for part in MEASURED)}


def tolerance(parallelism: str) -> float:
    return 0.0 if parallelism == "ddp" else 2e-6


@pytest.mark.parametrize("scenario", ["dpo", "orpo"])
def test_two_processes_are_one(alone, together, scenario):
    parallelism, directory = together
    assert_alike(directory / scenario, alone / scenario, tolerance(parallelism))
    one = load_file(alone / scenario / "model" / "model.safetensors")
    other = load_file(directory / scenario / "model" / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=tolerance(parallelism), rtol=0)
    load_model(str(directory / scenario / "model"))  # a plain directory


@pytest.mark.parametrize("scenario", ["dpo", "orpo"])
def test_resumed_equals_uninterrupted(together, scenario):
    assert_alike(together[1] / f"resumed-{scenario}", together[1] / scenario, atol=0.0)


def test_what_two_processes_saved_one_resumes(launch, together):
    parallelism, directory = together
    there = launch(1, "ddp", *(f"{scenario}@{directory / scenario}" for scenario in ("dpo", "orpo")))
    for scenario in ("dpo", "orpo"):
        assert_alike(there / f"resumed-{scenario}", directory / scenario, tolerance(parallelism))


@pytest.mark.skipif(bool(NO_VLLM), reason=NO_VLLM)
def test_zero3_with_a_vllm_in_each_process(launch):
    """Every push is proven by the canary; greedy, so the B' of two processes are those of one."""
    alone, together = launch(1, "ddp", "vllm"), launch(2, "zero3", "vllm")
    assert_alike(together / "vllm", alone / "vllm", 2e-6)
    assert json.loads((together / "vllm.json").read_text())["version"] == 3
