"""The plan of memory: its parts by hand, its activations against what autograd keeps, its sum against a process's peak."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.shapes import Shape, make_pairs, save, smollm2_shape
from components.common.generation.engines import ENGINES
from components.common.kernels.pair_logps import response_logps, shared_prefix_attention
from components.common.kernels.pair_packing import collate
from components.sapo.config import SAPOConfig
from components.sapo.lora import add_adapter, load_policy
from components.sapo.planning import memory, remedies, sizes
from components.sapo.planning.sizes import GIB, Adapter, MicroBatch, Setup

LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
SMALL = MicroBatch(pairs=1, tokens=100, scored=50)


@pytest.fixture(scope="module")
def llama():
    return sizes.architecture(LLAMA)


def test_sizes_come_from_the_config_alone(llama):
    assert llama.parameters == 8_030_261_248  # as published for Meta-Llama-3-8B
    assert llama.head == 128256 * 4096
    assert llama.layer * 32 + 2 * llama.head + 4096 == llama.parameters


def test_each_way_of_sharding_by_hand(llama):
    p, dpo = llama.parameters, Setup(processes=8, sampler=None)
    weights = {way: memory._weights(llama, dataclasses.replace(dpo, parallelism=way)) for way in ("ddp", "zero2")}
    weights |= {way: memory._weights(llama, dataclasses.replace(dpo, parallelism=way)) for way in ("zero3", "fsdp2")}
    assert weights["ddp"]["weights"] == weights["ddp"]["EMA"] == weights["ddp"]["reference"] == 4 * p
    assert weights["zero2"]["weights"] == 2 * p
    assert weights["zero3"]["weights"] == 2 * p / 8
    assert weights["fsdp2"]["weights"] == 4 * p / 8
    assert [weights[way]["float32 masters"] for way in weights] == [0, 4 * p / 8, 4 * p / 8, 0]
    assert all(weights[way]["EMA"] == weights[way]["optimizer"] == 4 * p / 8 for way in ("zero2", "zero3", "fsdp2"))


def test_an_adapter_spares_what_is_kept_for_trained_weights(llama):
    adapter = Adapter(rank=16, targets=("q_proj", "v_proj"))
    assert adapter.parameters(llama) == 16 * 32 * ((4096 + 4096) + (4096 + 1024))
    whole = memory._weights(llama, Setup(optimizer="adamw_torch", sampler=None))
    lora = memory._weights(llama, Setup(optimizer="adamw_torch", sampler=None, adapter=adapter))
    kept = ("optimizer", "EMA", "reference")
    assert sum(lora[name] for name in kept) < sum(whole[name] for name in kept) / 100
    assert 15 < lora["weights"] / 1e9 < 17  # the base in bfloat16
    in_4bit = dataclasses.replace(adapter, in_4bit=True)
    packed = memory._weights(llama, Setup(sampler=None, adapter=in_4bit))["weights"]
    assert packed == pytest.approx(0.516 * llama.in_linears + 2 * 2 * llama.head, rel=0.01)


def test_a_run_that_does_not_fit_is_told_what_to_change(llama):
    batch = sizes.micro_batch(8, 1348, 700, 222, from_divergence=True, packed=True)
    setup = Setup(processes=8, parallelism="ddp", sampler="vllm")
    assert not memory.plan(llama, batch, setup, 80e9).fits
    text = remedies.advice(llama, batch, setup, 80e9)
    assert text.startswith("--gradient_checkpointing true --sleep_level 1 --parallelism zero3: ")
    changed = dataclasses.replace(setup, parallelism="zero3", checkpointing=True, sleeps=True)
    assert memory.plan(llama, batch, changed, 80e9).fits
    assert "no other setting is enough" in remedies.advice(llama, batch, setup, 1e9)
    assert remedies.advice(llama, batch, setup, 24e9).startswith("an adapter on a base in 4 bits: a `*-24gb` recipe: ")


def test_a_run_that_generates_too_much_at_once_is_told_how_much_fits(llama):
    setup = Setup(adapter=Adapter(in_4bit=True), checkpointing=True, cached_prompts=64, cached_length=2048)
    batch = sizes.micro_batch(4, 1348, 700, 222, from_divergence=True, packed=True)
    assert memory.plan(llama, batch, setup, 24e9).generate == {
        "key-value cache": 2 * 32 * 8 * 128 * 2 * 64 * 2048,
        "prompts": (2 * 2 + 2 * 4) * 14336 * 64 * 2048,
        "a layer out of 4 bits": 2 * 4096 * 14336,
    }
    on_cpu = memory.plan(llama, batch, dataclasses.replace(setup, on_cpu=True), 24e9).generate
    assert on_cpu["weights laid out for a CPU"] == 2 * llama.head
    plain = memory.plan(llama, batch, Setup(on_cpu=True), 24e9).generate
    assert plain["weights laid out for a CPU"] == 2 * (llama.head + llama.in_linears)
    assert remedies.advice(llama, batch, setup, 24e9).startswith("--sampler_batch_size 16: ")


def test_the_peak_is_that_of_the_fullest_moment(llama):
    planned = memory.plan(llama, SMALL, Setup(sampler="vllm", utilization=0.5), 80e9)
    always = sum(planned.always.values())
    assert planned.always["vLLM"] == 40e9
    fullest = max(sum(planned.train.values()), sum(planned.step.values()))
    assert planned.peak == pytest.approx((always + fullest) * 1.05 + 1.5 * GIB)
    asleep = memory.plan(llama, SMALL, Setup(sampler="vllm", utilization=0.5, sleeps=True), 80e9)
    assert asleep.peak < planned.peak - 30e9


SHAPE = Shape(pairs=2, prompt=(60, 60), response=(50, 50), segment=(24, 24))


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(bf16):
    one, two = (_kept(smollm2_shape(layers, vocabulary=1000), bf16) for layers in (1, 2))
    assert _planned(Setup(bf16=bf16, on_cpu=True)) == pytest.approx(two - one, rel=0.05)


def test_activations_beside_an_adapter_on_a_base_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    args = SAPOConfig(output_dir=str(tmp_path), use_peft=True, load_in_4bit=True, lora_r=4, use_cpu=True)
    kept = []
    for layers in (1, 2):
        smollm2_shape(layers, vocabulary=1000).save_pretrained(tmp_path / str(layers))
        policy = load_policy(str(tmp_path / str(layers)), args)
        add_adapter(policy, args)
        kept.append(_kept(policy, bf16=False))
    adapter = Adapter(rank=4, in_4bit=True)
    assert _planned(Setup(bf16=False, on_cpu=True, adapter=adapter)) == pytest.approx(kept[1] - kept[0], rel=0.05)


def _planned(setup):
    """Bytes of one layer for the pairs of `_kept`."""
    batch = collate(make_pairs(SHAPE), 0, share=True, from_divergence=True)
    size = MicroBatch(2, batch.model_inputs["input_ids"].numel(), len(batch.targets))
    return memory.layer_bytes(sizes.architecture(smollm2_shape(1, vocabulary=1000).config), size, setup)


def _kept(model, bf16):
    """Bytes kept for backward; not parameters, nor their casts."""
    batch = collate(make_pairs(SHAPE), 0, share=True, from_divergence=True)
    weights = {p.shape for p in model.parameters()} | {p.t().shape for p in model.parameters() if p.dim() == 2}
    kept = {}

    def note(tensor):
        if tensor.shape not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks, shared_prefix_attention(model):
        response_logps(model, batch).sum()
    return sum(size for size, _ in kept.values())


CHILD = """
import json, sys, tempfile
import numpy as np
from pathlib import Path
from components.common.models.loading import load_model, load_tokenizer
from components.common.training.config import settle_process
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer
from transformers import AutoConfig
from components.sapo.planning.describe import Node, _batch, _setup
from components.sapo.planning import memory, remedies, sizes

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":")) * 1024

directory, checkpointing = sys.argv[1], sys.argv[2] == "true"
random = np.random.default_rng(0)
rows = [{"id": str(i), "prompt_ids": random.integers(5, 999, 200).tolist(), "chosen_ids": random.integers(5, 999, 100).tolist()}
        for i in range(4)]
output = tempfile.mkdtemp()
settle_process(Path(output))
args = SAPOConfig(output_dir=output, per_device_train_batch_size=2, segment_length=64, max_new_tokens=16, max_steps=2,
                  save_strategy="no", report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=checkpointing,
                  disable_tqdm=True)
tokenizer = load_tokenizer(directory)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
SAPOTrainer(load_model(directory, "float32"), args, rows, processing_class=tokenizer).train()
model = sizes.architecture(AutoConfig.from_pretrained(directory))
planned = memory.plan(model, _batch(rows, args, True), _setup(rows, args, Node(use_cpu=True), True), 1e12)
print(json.dumps({"measured": status("VmHWM") - before, "planned": planned.peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_plan_of_smollm2_is_near_its_measured_peak(checkpointing, tmp_path):
    save(smollm2_shape(), str(tmp_path))
    command = [sys.executable, "-c", CHILD, str(tmp_path), checkpointing]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


def test_what_an_engine_takes_follows_from_what_it_can_do(llama, third_engine, monkeypatch):
    """One that takes a share has it all the time, unless it can sleep and does; another takes nothing of this process."""
    entry = ENGINES["third"]
    setup = Setup(sampler="third", utilization=0.5, sleeps=True, cached_prompts=8, cached_length=64)

    def planned(**able) -> memory.Plan:
        monkeypatch.setitem(ENGINES, "third", dataclasses.replace(entry, **able))
        return memory.plan(llama, SMALL, setup, 10 * GIB)

    assert "Third" not in planned().always and planned().generate == {}
    assert memory.engine_needs(llama, setup, 0) == 0
    assert planned(takes_gpu_share=True).always["Third"] == 5 * GIB
    assert planned(takes_gpu_share=True, can_sleep=True).generate == {"Third": 5 * GIB}
    assert "key-value cache" in planned(serves_in_place=True).generate
    planned(takes_gpu_share=True, workspace=3.0)
    assert memory.engine_needs(llama, setup, 0) == 2 * llama.parameters + 3
