"""`pairs.jsonl`: pairs as people read them, with B and B' apart, for the report's page of sampled pairs."""

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.sapo.pairs import Pair


class PairLog:
    """Appends pairs to a file as JSON Lines.

    Args:
        path: the file; made with its first pair.
        tokenizer: turns ids into text; special tokens stay visible, so that one sees where a response ends.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.path = path
        self.tokenizer = tokenizer

    def write(self, step: int, pair: Pair, logp_b: Tensor, logp_b_prime: Tensor, versions_behind: int) -> None:
        """Writes one pair as it is trained on.

        Args:
            logp_b, logp_b_prime: the policy's sums over B and B', in nats.
            versions_behind: EMA updates since the weights that wrote B'.
        """
        line = {
            "step": step,
            "row_id": pair.row_id,
            "split": "train",
            "prompt": self._text(pair.prompt),
            "a": self._text(pair.chosen[: pair.b.start]),
            "b": self._text(pair.chosen[pair.b.start : pair.b.end]),
            "b_prime": self._text(pair.rejected[pair.b_prime.start : pair.b_prime.end]),
            "c": self._text(pair.chosen[pair.b.end :]),
            "c_kept": pair.c_kept,
            "ema_version": pair.version,
            "versions_behind": versions_behind,
            "generated_at_step": pair.step,
            "logp_b": round(float(logp_b), 4),
            "logp_b_prime": round(float(logp_b_prime), 4),
        }

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drops the lines of later steps, which a resumed run writes again; of step 0 on, all of them."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(kept), encoding="utf-8")

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))
