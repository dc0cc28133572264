"""The GPU's program on a CPU: it runs whole, tells what failed, ends in time, and compares what it says it compares."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.record import Case, Context
from benchmarks.gpu.shapes import capybara_pair, random_model, unshared, visible_pairs
from benchmarks.gpu.timing import kind_of
from components.common.kernels.pair_logps import response_logps
from components.common.kernels.pair_packing import collate

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 100,
}

# Some packages are not where a GPU is lent. What looks for them finds nothing, as if they were not installed.
WITHOUT = """
import sys
ABSENT = ("boto3", "botocore", "pydantic", "pydantic_core", "trl", "datasets", "vllm", "deepspeed", "bitsandbytes")
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import benchmarks.gpu.__main__
import components.sapo.planning.describe
from components.sapo.trainer import SAPOTrainer
assert not [name for name in ABSENT if name in sys.modules]
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_program_runs_on_a_cpu(tmp_path):
    out = tmp_path / "results.json"
    finished = run_python("-m", "benchmarks.gpu", "--tiny", "--cpu", "--out", str(out))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found = json.loads(out.read_text())
    assert not found["failed"] and not found["not_run"]
    assert {row["group"] for row in found["rows"]} == {"right", "fast", "planned"}
    checked = {row["case"] for row in found["rows"] if row["ok"]}
    assert checked >= {"packed = padded", "fused head = all logits", "two runs alike", "resumed = uninterrupted"}
    assert finished.stdout.rstrip().endswith("good")


@pytest.mark.slow
def test_neither_the_program_nor_the_trainer_needs_what_a_lent_machine_lacks():
    finished = run_python("-c", WITHOUT)
    assert finished.returncode == 0, finished.stderr[-2000:]


def context_of(tmp_path, seconds: float, tiny: bool = False) -> Context:
    return Context(torch.device("cpu"), tiny, time.monotonic() + seconds, tmp_path / "results.json")


def test_a_case_that_fails_is_told_and_the_next_one_runs(tmp_path):
    def fails(context: Context) -> None:
        context.add("fast", "before", "the failure", ms=1.0)
        raise ValueError("a kernel is missing")

    context = context_of(tmp_path, 100)
    context.run(Case("fast", "broken", 1, fails))
    assert json.loads(context.path.read_text())["rows"][0]["case"] == "before"  # it is written at once
    context.run(Case("right", "sound", 1, lambda context: context.add("right", "1 = 1", "here", True)))
    found = json.loads(context.path.read_text())
    assert "ValueError: a kernel is missing" in found["failed"]["broken"]
    assert "raise ValueError" in found["failed"]["broken"]
    assert [row["case"] for row in found["rows"]] == ["before", "1 = 1"]
    assert not context.is_good


def test_a_case_for_which_no_time_is_left_does_not_start(tmp_path):
    context = context_of(tmp_path, 5)
    context.run(Case("fast", "long", 60, lambda context: pytest.fail("it started")))
    assert list(json.loads(context.path.read_text())["not_run"]) == ["long"]
    assert context.is_good  # nothing that ran was wrong


def test_a_check_that_does_not_hold_is_no_success(tmp_path):
    context = context_of(tmp_path, 5)
    context.add("right", "1 = 2", "here", False)
    assert not context.is_good and "BAD" in context.table()


def test_a_hung_case_is_cut_off_and_what_was_measured_is_there(tmp_path):
    out = tmp_path / "results.json"
    script = f"""
import time, torch
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.record import Case
program.GRACE = 6
program.CASES[:] = [
    Case("right", "quick", 0, lambda context: context.add("right", "quick", "here", True)),
    Case("right", "hung", 0, lambda context: time.sleep(900)),
]
program.main(["--tiny", "--cpu", "--minutes", "0.001", "--only", "right", "--out", {str(out)!r}])
"""
    start = time.monotonic()
    assert run_python("-c", script).returncode == 1
    assert time.monotonic() - start < 600
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["rows"]] == ["quick"]
    assert list(found["failed"]) == ["hung: cut off"]


def test_packing_without_sharing_gives_what_padded_rows_give():
    random = np.random.default_rng(0)
    pairs = [capybara_pair(random, 100, scale=1 / 64) for _ in range(4)]
    model = random_model(torch.device("cpu"), SMALL)
    batch = unshared(pairs)
    padded = collate(pairs, pad_id=0, share=False)
    assert torch.equal(batch.response_mask, padded.response_mask)
    torch.testing.assert_close(response_logps(model, batch), response_logps(model, padded))


def test_pairs_are_as_long_as_they_say():
    random = np.random.default_rng(0)
    pairs = [capybara_pair(random, 1000) for _ in range(500)]
    lengths = [len(pair.prompt) + len(pair.chosen) for pair in pairs]
    assert max(lengths) <= 2048 and 1050 < np.median(lengths) < 1270
    assert all(len(pair.chosen) == len(pair.rejected) for pair in pairs)


def test_visible_pairs_are_counted():
    random = np.random.default_rng(1)
    batch = collate([capybara_pair(random, 100, scale=1 / 64) for _ in range(3)], pad_id=0, share=True)
    count = 0
    for span in batch.spans or []:
        for before, own in ((0, span.prefix), (span.prefix, span.chosen), (span.prefix, span.rejected)):
            count += sum(before + i + 1 for i in range(own))
    assert visible_pairs(batch.spans or []) == count


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_tem_fused_flex_attention_backward_zeros_1", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::...>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_kernels_are_told_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind
