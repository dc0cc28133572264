"""A run that is interrupted and resumed equals one that was not: every tensor, every metric, bit for bit."""

import json
import random

import pytest
import torch

from components.common.core.conversations import read_rows
from components.common.core.errors import UserError
from components.common.training.stop import StopCallback, StopRequest
from components.sapo.checkpoint import complete_checkpoints
from components.sapo.config import SAPOConfig
from components.sapo.trainer import SAPOTrainer

pytestmark = pytest.mark.slow

SETTINGS = {
    "num_train_epochs": 2.0,  # 48 rows: 12 steps an epoch with 4 a step
    "per_device_train_batch_size": 4,
    "max_length": 96,
    "segment_length": 6,
    "max_new_tokens": 6,
    "replay_buffer_size": 30,
    "learning_rate": 1e-3,
    "ema_interval": 2,
    "reference_interval": 5,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 1,
    "save_total_limit": None,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
TIMES = ("seconds/", "pairs_per_second", "tokens_per_second", "train_", "total_flos", "memory/")


@pytest.fixture
def build(micro_model, chat_data):
    def make(directory, **settings) -> SAPOTrainer:
        torch.manual_seed(random.randrange(2**31))  # a new process would not start with equal random states
        args = SAPOConfig(output_dir=str(directory), **(SETTINGS | settings))
        return SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train"), read_rows(chat_data, "test")[:6])

    return make


def stop_after(trainer: SAPOTrainer, step: int) -> None:
    request = StopRequest()
    trainer.add_callback(StopCallback(request))
    after_step = trainer.after_step

    def count() -> None:
        after_step()
        request.requested = trainer.state.global_step == step

    trainer.after_step = count  # type: ignore[method-assign]


def tensors(trainer: SAPOTrainer) -> dict[str, torch.Tensor]:
    models = {"policy": trainer.policy, "ema": trainer.weights.ema_model, "reference": trainer.weights.reference}
    found = {f"{name}.{k}": v for name, m in models.items() if m is not None for k, v in m.state_dict().items()}
    buffer = {f"buffer.{name}": torch.from_numpy(array) for name, array in trainer.buffer.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()["state"]
    return (
        found | buffer | {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, s in optimizer.items() for k, v in s.items()}
    )


def metrics(trainer: SAPOTrainer) -> list[dict]:
    history = [{k: v for k, v in entry.items() if not k.startswith(TIMES)} for entry in trainer.state.log_history]
    return [entry for entry in history if set(entry) - {"epoch", "step"}]


def assert_equal_runs(resumed: SAPOTrainer, whole: SAPOTrainer) -> None:
    mine, theirs = tensors(resumed), tensors(whole)
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not differing
    assert metrics(resumed) == metrics(whole)
    tokens = [{k: v for k, v in run.wall_clock().items() if k.startswith("tokens/")} for run in (resumed, whole)]
    assert tokens[0] == tokens[1]


CASES = {
    "dpo": {},
    "orpo": {"loss_type": "orpo", "optim": "adamw_torch", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "on_policy": {"on_policy": True, "responses_per_prompt": 2, "reference": "policy"},
    "overlap": {"schedule": "overlap"},
    "overlap_stale": {"schedule": "overlap", "push_interval": 3, "ema_interval": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(build, tmp_path, case):
    """Interrupted at the epoch's edge (12) and at random steps; steps 1 to 3 have unlogged metrics, 13 starts an epoch."""
    whole = build(tmp_path / "whole", **CASES[case])
    whole.train()
    for step in [12, *random.Random(case).sample(range(1, 24), 2)]:
        directory = tmp_path / f"cut-{step}"
        cut = build(directory, **CASES[case], save_strategy="no")
        stop_after(cut, step)
        cut.train()
        assert (cut.state.global_step, [p.name for p in complete_checkpoints(directory)]) == (
            step,
            [f"checkpoint-{step}"],
        )
        resumed = build(directory, **CASES[case])
        resumed.train(resume_from_checkpoint=True)
        assert_equal_runs(resumed, whole)
        assert (directory / "pairs.jsonl").read_text() == (tmp_path / "whole" / "pairs.jsonl").read_text()


@pytest.mark.parametrize("call", [15, 16])
def test_killed_between_micro_batches(build, tmp_path, call):
    """The eighth step dies before its first or its second micro-batch; the checkpoint of step 6 is the newest."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    killed = build(tmp_path / "cut", **settings)
    compute_loss, calls = killed.compute_loss, iter(range(1, 100))

    def die(*args, **kwargs):
        if next(calls) == call:
            raise RuntimeError("killed")
        return compute_loss(*args, **kwargs)

    killed.compute_loss = die
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed.step == 6
    assert_equal_runs(resumed, whole)


def test_interrupted_many_times(build, tmp_path):
    whole = build(tmp_path / "whole")
    whole.train()
    for step in (2, 3, 11, 17):
        run = build(tmp_path / "cut")
        stop_after(run, step)
        run.train(resume_from_checkpoint=step != 2)
    last = build(tmp_path / "cut")
    last.train(resume_from_checkpoint=True)
    assert_equal_runs(last, whole)


def test_a_finished_run_is_not_trained_further(build, tmp_path):
    done = build(tmp_path, max_steps=5)
    done.train()
    again = build(tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert all(torch.equal(a, b) for a, b in zip(again.policy.parameters(), done.policy.parameters(), strict=True))


def test_only_the_newest_are_kept(build, tmp_path):
    build(tmp_path, max_steps=6, save_total_limit=2).train()
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-5", "checkpoint-6"]


def test_no_pickle_is_written(build, tmp_path):
    build(tmp_path, max_steps=2).train()
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors"}


@pytest.fixture
def saved(build, tmp_path):
    build(tmp_path, max_steps=4).train()
    return tmp_path


def test_an_unfinished_save_is_passed_over(build, saved):
    (saved / "checkpoint-4" / "manifest.json").unlink()  # as a kill during the save leaves it
    resumed = build(saved, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed.step == 3
    assert [path.name for path in complete_checkpoints(saved)][-1] == "checkpoint-4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "ema.safetensors").write_bytes(b"x"), r"ema\.safetensors: has 1 bytes, the manifest says"),
        (lambda d: (d / "ema.safetensors").unlink(), r"ema\.safetensors: is missing from the checkpoint"),
        (lambda d: _flip_last_byte(d / "buffer.safetensors"), r"was changed after it was saved \(sha256 differs\)"),
        (lambda d: (d / "manifest.json").write_text("{"), "is not the manifest of a SAPO checkpoint"),
        (lambda d: (d / "manifest.json").write_text('{"kind": "x", "schema": 1}'), "is not the manifest of a SAPO"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_an_older_one_serves(build, saved, damage, message):
    damage(saved / "checkpoint-4")
    with pytest.raises(UserError, match=message):
        build(saved, max_steps=4).train(resume_from_checkpoint=True)
    older = build(saved, max_steps=4)
    older.train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert older.state.global_step == 4


def _flip_last_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.2, "ema_decay": 0.9}, r"beta was 0\.1, is 0\.2; ema_decay was 0\.5, is 0\.9"),
        ({"replay_buffer_size": 31}, "replay_buffer_size was 30, is 31"),
        ({"max_steps": 9}, "max_steps was 4, is 9"),
    ],
)
def test_other_settings_are_refused_by_name(build, saved, change, message):
    with pytest.raises(UserError, match=message):
        build(saved, **({"max_steps": 4} | change)).train(resume_from_checkpoint=True)


def test_other_rows_are_refused(build, saved, micro_model, chat_data):
    args = SAPOConfig(output_dir=str(saved), **(SETTINGS | {"max_steps": 4}))
    trainer = SAPOTrainer(str(micro_model), args, read_rows(chat_data, "train")[1:], read_rows(chat_data, "test")[:6])
    with pytest.raises(UserError, match="other training rows"):
        trainer.train(resume_from_checkpoint=True)


def test_where_logs_go_may_change(build, saved):
    (saved / "checkpoint-4" / "manifest.json").unlink()
    build(saved, max_steps=4, logging_steps=1, save_steps=2, eval_steps=2).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from(build, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint to resume from"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_manifest_lists_every_file_with_its_digest(saved):
    manifest = json.loads((saved / "checkpoint-4" / "manifest.json").read_text())
    names = {path.name for path in (saved / "checkpoint-4").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert (manifest["kind"], manifest["step"]) == ("sapo-checkpoint", 4)
