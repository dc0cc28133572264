"""What runs on a GPU: right, fast, planned. Needs no network, and leaves what it measured if it is cut off.

make gpu                                            # everything, in seven minutes at most
python -m benchmarks.gpu --tiny                     # the same program at the sizes of a test, on a CPU
python -m benchmarks.gpu --only right --out FILE    # one part of it
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

START = time.monotonic()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, where a case asks for them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.gpu import fast, right, there  # noqa: E402
from benchmarks.gpu.record import Case, Context  # noqa: E402

# In order of importance; the seconds are what a case may take on an H100, compilation included.
CASES = [
    Case("fast", "limits", 10, there.limits),
    Case("right", "fused", 30, right.fused),
    Case("right", "packed_llama", 50, right.packed_llama),
    Case("fast", "attention_alone", 40, fast.attention_alone),
    Case("fast", "dpo_1b", 45, fast.dpo_1b),
    Case("fast", "iteration", 60, fast.iteration),
    Case("right", "repeated", 45, right.repeated),
    Case("fast", "dpo_8b", 35, fast.dpo_8b),
    Case("fast", "ema", 10, fast.ema),
    Case("right", "head", 15, right.head),
    Case("fast", "head_alone", 10, fast.head_alone),
    Case("right", "ema_equation", 5, right.ema),
    Case("right", "packed_others", 35, right.packed_others),
    Case("right", "lora", 10, right.lora),
    Case("right", "checkpointing", 15, right.checkpointing),
    Case("fast", "against_others", 45, fast.against_others),
    Case("fast", "host_work", 5, fast.host_work),
    Case("fast", "lora_8b", 35, fast.lora_8b),
    Case("fast", "orpo_1b", 25, fast.orpo_1b),
    Case("fast", "sampler", 30, fast.sampler),
]
GRACE = 15  # seconds after the last minute
GROUPS = ("right", "fast", "planned")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where all that ran was right."""
    arguments = _arguments(argv)
    _quiet()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    tiny = arguments.tiny or device.type == "cpu"
    context = Context(device, tiny, START + 60 * arguments.minutes, _path(arguments.out, device, tiny))
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 is the reference here
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # many models in one process

    _cut_off_at_deadline(context)

    there.look(context)
    context.write()
    wanted = arguments.only
    for case in CASES:
        # What is planned is compared where it is measured, in the cases that time.
        if case.group in wanted or (case.group == "fast" and "planned" in wanted):
            context.run(case)
    context.there["run_seconds"] = round(time.monotonic() - START, 1)
    context.write()
    print(f"\n{context.table()}\n\nwrote {context.path}: {'good' if context.is_good else 'NOT GOOD'}", flush=True)
    return 0 if context.is_good else 1


def _cut_off_at_deadline(context: Context) -> None:
    """A case that takes far longer than it should does not outlive the run; what was measured is written."""

    def cut() -> None:
        context.failed[f"{context.running}: cut off"] = f"still ran {GRACE} s after the end"
        context.write()
        print(f"\n{context.table()}\n\nwrote {context.path}: CUT OFF", flush=True)
        os._exit(1)

    timer = threading.Timer(max(context.left(), 0) + GRACE, cut)
    timer.daemon = True
    timer.start()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="no case starts that may end later (default: 7)")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test; always so on a CPU")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--only", default=",".join(GROUPS), help="of right, fast and planned, joined by commas")
    parser.add_argument(
        "--out", help="file of results (default: benchmarks/results-<gpu>.json; a temporary one otherwise)"
    )
    arguments = parser.parse_args(argv)
    arguments.only = arguments.only.split(",")
    if unknown := [name for name in arguments.only if name not in GROUPS]:
        parser.error(f"--only {unknown[0]}: takes {', '.join(GROUPS)}")
    return arguments


def _path(given: str | None, device: torch.device, tiny: bool) -> Path:
    if given is not None:
        return Path(given)
    if tiny:
        return Path(tempfile.mkdtemp()) / "results.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return Path(__file__).parents[1] / f"results-{name}.json"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
