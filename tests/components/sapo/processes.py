"""Runs SAPO in the processes of a launch, for the tests of several processes: `torchrun -m tests.components.sapo.processes`.

Each scenario is a few steps on a micro model with logits so far apart that rounding changes no token. What it ends with is
gathered and written by the first process, so that runs of other numbers of processes can be compared with it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.common.core.conversations import read_rows
from components.common.models.loading import load_model, load_tokenizer
from components.common.training.distributed import launch
from components.common.training.distributed.processes import destroy_process_group, gather, is_main_process
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer

SETTINGS = {
    "max_steps": 6,
    "max_length": 96,
    "segment_length": 6,
    "max_new_tokens": 6,
    "replay_buffer_size": 12,
    "ema_interval": 2,
    "reference_interval": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
SAVES = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
# A plain epsilon would turn rounding noise in gradients that are nearly 0 into whole steps.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-3, "warmup_steps": 3}
SGD = {"optim": "sgd", "learning_rate": 0.02}
SCENARIOS = {
    "dpo": SGD | SAVES,
    "orpo": ADAM | SAVES | {"loss_type": "orpo"},
    "vllm": SGD | {"sampler": "vllm", "temperature": 0.0, "eval_strategy": "no"},
}


def run(model: str, data: str, output: Path, scenario: str) -> None:
    """Runs a scenario, or goes on from the checkpoint of one: `dpo@DIRECTORY`, relative to `output`."""
    scenario, _, checkpoint = scenario.partition("@")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Two micro-batches of two pairs each, in two processes or one after the other.
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes}
    name = f"resumed-{scenario}" if checkpoint else scenario
    args = SAPOConfig(output_dir=str(output / name), **(SETTINGS | batches | SCENARIOS[scenario]))
    policy = load_model(model, torch.float32)
    rows = read_rows(data, "train"), read_rows(data, "test")[:5] if args.eval_strategy != "no" else None
    trainer = SAPOTrainer(policy, args, *rows, processing_class=load_tokenizer(model))
    trainer.train(resume_from_checkpoint=str(output / checkpoint / "checkpoint-3") if checkpoint else None)
    write(trainer, output / name)
    trainer.save_trained(output / name / "model")
    if scenario == "vllm":
        trainer.sampler.close()


def write(trainer: SAPOTrainer, place: Path) -> None:
    """The weights as `<place>.safetensors`, log and buffer as `<place>.json`."""
    layout = trainer.weights.layout
    groups = {"policy": layout.parts(), "ema": trainer.weights.ema.average}
    if trainer.preference.reference:
        groups["reference"] = trainer.weights.reference_parts
    tensors = {f"{group}/{k}": v.clone() for group, parts in groups.items() for k, v in layout.weights(parts)}
    buffer = {name: array.tolist() for name, array in trainer.buffer.state_dict().items()}
    assert len({json.dumps(one) for one in gather([buffer])}) == 1  # every process has the same buffer
    if is_main_process():
        save_file({k: v.contiguous() for k, v in tensors.items()}, f"{place}.safetensors")
        log = trainer.state.log_history
        Path(f"{place}.json").write_text(json.dumps({"log": log, "buffer": buffer, "version": trainer.sampler.version}))


def main() -> None:
    parallelism, model, data, output, *scenarios = sys.argv[1:]
    if launch.is_launched():
        launch.join(parallelism, on_cpu=True)
    Path(output).mkdir(parents=True, exist_ok=True)
    for scenario in scenarios:
        run(model, data, Path(output), scenario)
    if launch.is_launched():
        destroy_process_group()


if __name__ == "__main__":
    main()
