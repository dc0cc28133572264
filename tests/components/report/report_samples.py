"""One entry of each kind of artifact, for the tests of the report."""

from collections.abc import Callable
from typing import Any

WriteEvaluation = Callable[..., str]
WriteTraining = Callable[..., str]


def measurement(metric: str, value: float, stderr: float | None, higher: bool = True, **more: Any) -> dict[str, Any]:
    entry = {"benchmark": "held_out", "metric": metric, "value": value, "stderr": stderr, "n": 500}
    return {**entry, "higher_is_better": higher, "description": f"What {metric} means.", **more}


def pair(step: int, **more: Any) -> dict[str, Any]:
    texts = {
        "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "a": "I am",
        "b": " fine",
        "c": ", you?",
    }
    numbers = {"c_kept": True, "ema_version": step // 2, "logp_b": -31.25, "logp_b_prime": None}
    return {"step": step, "row_id": f"row-{step}", "split": "train", **texts, "b_prime": " fish", **numbers, **more}
