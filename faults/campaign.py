"""The fault campaign: SAPO runs on a real S3 store, disturbed in every way that a cluster knows, and what became of each.

    make faults                                   # every kind of fault; 0.3 of it took 18 minutes on two busy cores
    python -m faults.campaign --scale 0.1   # a short one

Everything random comes from --seed. A case is one run with a fault in it, and the same command again (with the same disk or
an empty one) until it ends. It must end with weights bit-identical to the undisturbed run's, or with one clear line; nothing in
the bucket may look complete that is not; and no step before the last saved checkpoint may be trained twice.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from faults import runner
from faults.proxy import KINDS, FaultProxy
from faults.store import ACCESS_KEY, BUCKET, SECRET_KEY, Store
from tests.conftest import chat_rows

if TYPE_CHECKING:
    from botocore.client import BaseClient

ARCHITECTURE = """
model: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, max_position_embeddings: 512, tie_word_embeddings: true}
tokenizer: {vocab_size: 400}
"""
STEPS = 16
SETTINGS = (
    *("--max_steps", STEPS, "--max_length", 96, "--segment_length", 6, "--max_new_tokens", 6, "--eval_rows", 4),
    *("--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--save_steps", 1, "--logging_steps", 1),
    *("--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--lease_seconds", 1.5, "--grace_seconds", 10),
)
ATTEMPTS = 8  # of the same command, after which a case counts as stuck


@dataclass
class Case:
    """What happened to one run."""

    kind: str
    faults: int = 1
    first_exit: int | None = None  # code of the disturbed attempt; negative: the signal
    resumed_from: list[int] = field(default_factory=list)  # steps of the checkpoints that later attempts went on from
    attempts: int = 0  # of the same command after that
    outcome: str = ""  # identical, refused, or what went wrong
    said: str = ""  # the line of a refusal
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """The store, the proxy, the undisturbed run, and a case for every fault.

    Args:
        directory: for everything.
        seed: of every random choice.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.store = Store(directory / "store")
        self.proxy = FaultProxy(self.store.endpoint, seed)
        self.count = 0
        self._objects()  # the client is made before any fault
        source = directory / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(64)), encoding="utf-8")
        architecture = directory / "micro.yaml"
        architecture.write_text(ARCHITECTURE)
        self._must("data", "--source", source, "--test_rows", 16, "--output", self.uri("data"))
        places = ("--data", self.uri("data"), "--output", self.uri("model"))
        self._must("model", "--source", f"scratch://{architecture}", *places)
        started = time.monotonic()
        self._must("sapo", *self._arguments(self.uri("undisturbed")))
        self.seconds = time.monotonic() - started
        self.weights = self._weights("undisturbed")

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    def close(self) -> None:
        self.proxy.close()
        self.store.stop()

    # ---- Runs -----------------------------------------------------------------------------------------------------

    def _arguments(self, output: str, model: str = "") -> list[object]:
        inputs = ["--data", self.uri("data"), "--model", model or self.uri("model")]
        return [*inputs, "--output", output, *SETTINGS]

    def _environment(self, disk: Path) -> dict[str, str]:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.directory)}
        return self.store.environment(self.proxy.endpoint) | quiet | {"SAPO_CACHE": str(disk), "AWS_MAX_ATTEMPTS": "6"}

    def _must(self, stage: str, *arguments: object) -> None:
        log = self.directory / f"{stage}.log"
        code = runner.run(stage, arguments, self._environment(self.directory / "disk"), log)
        if code != 0:
            raise RuntimeError(f"{stage} ended with {code}: {log.read_text()[-2000:]}")

    def _new(self) -> "Run":
        self.count += 1
        return Run(self, f"case-{self.count}")

    # ---- What is in the bucket ------------------------------------------------------------------------------------

    def _client(self) -> "BaseClient":
        import boto3
        from botocore.config import Config

        config = Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 10})
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.store.endpoint, config=config, **keys)

    def _objects(self, prefix: str = "") -> list[str]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self._client().get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, body: bytes) -> None:
        self._client().put_object(Bucket=BUCKET, Key=key, Body=body)

    def _weights(self, name: str) -> str:
        return hashlib.sha256(self.get(f"{name}/model.safetensors")).hexdigest()

    def lies(self, name: str) -> list[str]:
        """What below a prefix looks complete and is not: files that a manifest lists otherwise than they are."""
        found = []
        for key in self._objects(f"{name}/"):
            if not key.endswith("/.manifest.json"):
                continue
            folder = key.removesuffix("/.manifest.json")
            for file, told in json.loads(self.get(key))["files"].items():
                place = f"{folder.rpartition('/')[0]}/{told['at']}" if "at" in told else f"{folder}/{file}"
                if hashlib.sha256(self.get(place)).hexdigest() != told["sha256"]:
                    found.append(f"{folder}/{file} is not what its manifest says")
        return found

    def mirrored(self, name: str) -> list[int]:
        """Steps of the complete checkpoints of a run in the bucket."""
        pattern = re.compile(rf"{re.escape(name)}/checkpoints/checkpoint-(\d+)/\.manifest\.json")
        return sorted(int(match[1]) for key in self._objects(f"{name}/") if (match := pattern.fullmatch(key)))

    # ---- The faults -----------------------------------------------------------------------------------------------

    def killed(self, how: str, empty: bool) -> Case:
        """A process is killed (SIGKILL or SIGTERM) at a random moment; the pod comes back, with its disk or without."""
        case = Case(f"{how}, {'empty' if empty else 'same'} disk")
        run = self._new()
        process = run.start()
        process.join(self.random.uniform(0.1, 1.1) * self.seconds)
        process.kill() if how == "SIGKILL" else process.terminate()
        process.join()
        case.first_exit = process.exitcode
        expected = {"SIGKILL": (-9, 0), "SIGTERM": (143, -15, 0)}[how]
        if process.exitcode not in expected:
            case.problems.append(f"{how} ended with {process.exitcode}")
        saved = max([*self.mirrored(run.name), *([] if empty else run.saved())], default=0)
        if how == "SIGTERM" and empty and process.exitcode == 143 and (here := max(run.saved(), default=0)) > saved:
            case.problems.append(f"SIGTERM left step {here} on the disk, {saved} in the bucket")
        if empty:
            run.lose_disk()
        return run.finish(case, from_step=saved)

    def store_restarted(self) -> Case:
        """The store is stopped at a random moment of a run, and is back seconds later."""
        case, run = Case("store stopped and started"), self._new()
        process = run.start()
        process.join(self.random.uniform(0.1, 0.9) * self.seconds)
        self.store.stop(self.random.choice([9, 15]))
        time.sleep(self.random.uniform(0.2, 1.5))
        self.store.start()
        runner.wait(process, run.log)
        return run.finish(case, ended=process)

    def spoiled(self, kind: str) -> Case:
        """A fifth of the store's answers is spoiled in one way, or in all."""
        before = sum(self.proxy.done.values())
        case, run = Case(f"answers {kind}"), self._new()
        self.proxy.spoil(0.2, *(KINDS if kind == "mixed" else [kind]))
        try:
            return run.finish(case)
        finally:
            self.proxy.spoil(0.0)
            case.faults = max(sum(self.proxy.done.values()) - before, 1)

    def spoiled_and_killed(self) -> Case:
        """Both at once, and the disk is lost."""
        self.proxy.spoil(0.15)
        try:
            case = self.killed("SIGKILL", empty=True)
        finally:
            self.proxy.spoil(0.0)
        case.kind, case.faults = "spoiled answers and SIGKILL, empty disk", 2
        return case

    def unusable_store(self) -> Case:
        """Every answer is an error: the stage must say so at once; then the store is well again."""
        case, run = Case("store does not work at all"), self._new()
        self.proxy.spoil(1.0, self.random.choice(["throttled", "failed", "reset"]))
        try:
            process = run.start()
            runner.wait(process, run.log)
        finally:
            self.proxy.spoil(0.0)
        if process.exitcode != 2 or "error:" not in run.said():
            case.problems.append(f"ended with {process.exitcode}: {run.said()}")
        case.said = run.said()
        return run.finish(case, ended=process)

    def full_disk(self) -> Case:
        """The pod's disk is too small; it must say so, and end well on a larger one."""
        case, run = Case("full disk"), self._new()
        with small_disk(run.disk, self.random.randrange(300, 1200)):
            process = run.start()
            runner.wait(process, run.log)
            if process.exitcode == 0:
                case.problems.append("the disk was large enough")
            elif "free some space" not in run.said():
                case.problems.append(f"ended with {process.exitcode}: {run.said()}")
            case.first_exit, case.said = process.exitcode, run.said()
        run.lose_disk()
        return run.finish(case)

    def corrupted_checkpoint(self) -> Case:
        """A file of the newest checkpoint in the bucket is damaged: an older one, or the start, takes its place."""
        case, run = Case("damaged checkpoint"), self._new()
        process = run.start()
        while len(self.mirrored(run.name)) < 2 and process.is_alive():
            time.sleep(0.02)
        process.kill()
        process.join()
        steps = self.mirrored(run.name)
        if steps:
            names = self._objects(f"{run.name}/checkpoints/checkpoint-{steps[-1]}/")
            self._damage(self.random.choice([name for name in names if not name.endswith(".manifest.json")]))
        run.lose_disk()
        return run.finish(case, from_step=steps[-2] if len(steps) > 1 else 0)

    def corrupted_model(self) -> Case:
        """A weight file of the model to start from is damaged in the bucket: refused."""
        case, run = Case("damaged input model"), self._new()
        model = f"{run.name}-model"
        for key in self._objects("model/"):
            self.put(f"{model}/{key.removeprefix('model/')}", self.get(key))
        self._damage(f"{model}/model.safetensors")
        code = runner.run("sapo", self._arguments(run.uri, self.uri(model)), run.environment, run.log)
        case.attempts, case.said = 1, run.said()
        case.outcome = "refused" if code == 2 and "is damaged in the store" in case.said else f"ended with {code}"
        return case

    def _damage(self, key: str) -> None:
        """Flips a byte, or cuts the object short."""
        body = bytearray(self.get(key))
        if self.random.random() < 0.5 and body:
            body[self.random.randrange(len(body))] ^= 0xFF
        else:
            body = body[:-1]
        self.put(key, bytes(body))

    def two_pods(self) -> Case:
        """Two pods with disks of their own get the same command: one runs, the other refuses."""
        case, run = Case("two pods on one output"), self._new()
        other = Run(self, run.name, self.directory / f"{run.name}-other")
        processes = [run.start(), other.start()]
        for process in processes:
            runner.wait(process, run.log)
        codes = sorted(process.exitcode or 0 for process in processes)
        said = run.said() + other.said()
        if codes != [0, 0] and not (codes == [0, 2] and "is writing there now" in said):
            case.problems.append(f"ended with {codes}: {said}")
        case.first_exit, case.said = codes[-1], said
        other.lose_disk()
        return run.finish(case)

    def run(self, plan: list[tuple[str, Callable[[], Case]]]) -> list[Case]:
        cases = []
        for number, (name, fault) in enumerate(plan, start=1):
            started = time.monotonic()
            try:
                case = fault()
            except KeyboardInterrupt:
                break
            except Exception as error:
                case = Case(name, outcome=f"{type(error).__name__}: {error}")
            case.seconds = round(time.monotonic() - started, 1)
            print(f"{number}/{len(plan)} {case.kind}: {case.outcome} {'; '.join(case.problems)}", flush=True)
            cases.append(case)
        return cases


class Run:
    """One output, and the disk of the pod that makes it."""

    def __init__(self, campaign: Campaign, name: str, disk: Path | None = None) -> None:
        self.campaign = campaign
        self.name = name
        self.uri = campaign.uri(name)
        self.disk = disk or campaign.directory / name
        self.disk.mkdir(exist_ok=True)
        self.log = campaign.directory / f"{self.disk.name}.log"

    @property
    def environment(self) -> dict[str, str]:
        return self.campaign._environment(self.disk)

    def start(self) -> BaseProcess:
        return runner.start("sapo", self.campaign._arguments(self.uri), self.environment, self.log)

    def said(self) -> str:
        """The last line of the log that is an error."""
        lines = [line for line in self.log.read_text().splitlines() if "error:" in line] if self.log.exists() else []
        return lines[-1] if lines else ""

    def saved(self) -> list[int]:
        """Steps of complete checkpoints on the disk."""
        found = self.disk.glob("outputs/*/*/*/checkpoints/checkpoint-*/manifest.json")
        return [int(path.parent.name.removeprefix("checkpoint-")) for path in found]

    def lose_disk(self) -> None:
        shutil.rmtree(self.disk)
        self.disk.mkdir()

    def finish(self, case: Case, ended: BaseProcess | None = None, from_step: int = 0) -> Case:
        """The same command until it ends, and a look at what came out.

        Args:
            ended: the first attempt, where it was let run to its end.
            from_step: a checkpoint of this step was saved, so no step up to it may be trained again.
        """
        code = None if ended is None else ended.exitcode
        case.first_exit = code if case.first_exit is None else case.first_exit
        size = self.log.stat().st_size if self.log.exists() else 0
        while code != 0 and case.attempts < ATTEMPTS:
            code = runner.run("sapo", self.campaign._arguments(self.uri), self.environment, self.log)
            case.attempts += 1
        later = self.log.read_text()[size:]
        case.resumed_from = [int(step) for step in re.findall(r"resumes from \S*checkpoint-(\d+)", later)]
        if from_step and "already done" not in later and max(case.resumed_from, default=0) < from_step:
            case.problems.append(f"step {from_step} was saved; resumed from {case.resumed_from or 'the start'}")
        case.problems += self.campaign.lies(self.name)
        if code != 0:
            case.said, case.outcome = self.said(), f"stuck with {code}: {self.said()}"
        else:
            same = self.campaign._weights(self.name) == self.campaign.weights
            case.outcome = "identical" if same else "OTHER WEIGHTS"
        shutil.rmtree(self.disk, ignore_errors=True)
        return case


class small_disk:  # noqa: N801
    """A directory that holds so many KiB and no more: a tmpfs (needs root), else the block is not run."""

    def __init__(self, directory: Path, kib: int) -> None:
        self.directory = directory
        self.kib = kib

    def __enter__(self) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.kib}k", "tmpfs", str(self.directory)]
        subprocess.run(command, check=True, capture_output=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.directory)], check=True, capture_output=True)


def can_mount(directory: Path) -> bool:
    try:
        with small_disk(directory, 64):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def plan(campaign: Campaign, scale: float) -> list[tuple[str, Callable[[], Case]]]:
    """Faults in random order; `scale` is a share of their numbers, at least one of each."""
    probe = campaign.directory / "probe"
    probe.mkdir()
    wanted: list[tuple[int, str, Callable[[], Case]]] = [
        (15, "SIGKILL", lambda: campaign.killed("SIGKILL", empty=False)),
        (15, "SIGKILL", lambda: campaign.killed("SIGKILL", empty=True)),
        (12, "SIGTERM", lambda: campaign.killed("SIGTERM", empty=False)),
        (12, "SIGTERM", lambda: campaign.killed("SIGTERM", empty=True)),
        (8, "store restarted", campaign.store_restarted),
        *((5, kind, lambda kind=kind: campaign.spoiled(kind)) for kind in (*KINDS, "mixed")),
        (8, "spoiled and killed", campaign.spoiled_and_killed),
        (4, "unusable store", campaign.unusable_store),
        (4 if can_mount(probe) else 0, "full disk", campaign.full_disk),
        (5, "damaged checkpoint", campaign.corrupted_checkpoint),
        (3, "damaged model", campaign.corrupted_model),
        (4, "two pods", campaign.two_pods),
    ]
    faults = [(name, fault) for count, name, fault in wanted for _ in range(count and max(1, round(count * scale)))]
    campaign.random.shuffle(faults)
    return faults


def is_good(case: Case) -> bool:
    return case.outcome in ("identical", "refused") and not case.problems


def table(cases: list[Case]) -> str:
    """A Markdown table: a row for each kind of fault."""
    lines = ["| fault | runs | faults | ended bit-identical | refused clearly | wrong |", "|---|---|---|---|---|---|"]
    kinds = {case.kind: [c for c in cases if c.kind == case.kind] for case in sorted(cases, key=lambda c: c.kind)}
    for kind, some in [*kinds.items(), ("**all**", cases)]:
        good = [case for case in some if is_good(case)]
        identical = sum(case.outcome == "identical" for case in good)
        numbers = [len(some), sum(c.faults for c in some), identical, sum(bool(case.said) for case in good)]
        lines.append(f"| {kind} | {' | '.join(map(str, [*numbers, len(some) - len(good)]))} |")
    return "\n".join(lines)


def run_campaign(directory: Path, seed: int, scale: float, most: int | None = None) -> list[Case]:
    """The cases of a campaign, or the first `most` of them; Ctrl-C ends it with those that are through."""
    campaign = Campaign(directory, seed)
    try:
        return campaign.run(plan(campaign, scale)[:most])
    finally:
        campaign.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m faults.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults; 1 is the whole campaign")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="where results.json and .md go")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        cases = run_campaign(Path(directory), arguments.seed, arguments.scale)
    seconds = time.monotonic() - started
    text = f"Seed {arguments.seed}, {len(cases)} runs, {seconds / 60:.0f} minutes.\n\n{table(cases)}\n"
    print(f"\n{text}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "results.md").write_text(text, encoding="utf-8")
    content = {"seed": arguments.seed, "seconds": round(seconds), "cases": [asdict(case) for case in cases]}
    (arguments.results / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(map(is_good, cases)) else 1)


if __name__ == "__main__":
    main()
