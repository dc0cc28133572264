"""How far the policy has moved from the start model on held-out pairs.

B' is generated for every held-out row once, by the start model. Rewards are the change of a response's log-prob since then, in
the measure of the loss: times its `reward_scale`, and per token where it compares means. So every run begins at a margin of
exactly 0, and a margin above 0 means that y+ gained on y-.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from components.common.models.chat_templates import EncodedRow
from components.common.training.distributed.processes import gather
from components.sapo.config import SAPOConfig
from components.sapo.losses import LOSSES
from components.sapo.pairs import Pair, make_pair
from components.sapo.replay_buffer import Entry, pack, unpack
from components.sapo.sampling import RankSlice
from components.sapo.scoring import PairScorer
from components.sapo.weights import PolicyWeights


class HeldOutPairs:
    """Held-out pairs, and the start model's log-probs of them.

    Args:
        rows: held-out rows.
        args: settings.
        scorer: runs the policy on pairs.
        weights: the policy.
        autocast: opens mixed precision.
        rank_slice: this process's.
        stop_ids: tokens that end a turn.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        args: SAPOConfig,
        scorer: PairScorer,
        weights: PolicyWeights,
        autocast: Callable[[], AbstractContextManager[Any]],
        rank_slice: RankSlice,
        stop_ids: frozenset[int],
    ) -> None:
        self.rows = rows
        self.args = args
        self.scorer = scorer
        self.weights = weights
        self.autocast = autocast
        self.rank_slice = rank_slice
        self.stop_ids = stop_ids

        self.loss = LOSSES[args.loss_type]
        self.entries: list[Entry] = []
        self.pairs: list[Pair] = []
        self.start_logps: Tensor | None = None  # (2, pairs)

    def start(self, entries: list[Entry]) -> None:
        """Makes the pairs; the policy as it is now is the start."""
        self._make(entries)
        self.start_logps = self.logps()

    def _make(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.pairs = [
            make_pair(self.rows[entry.row], i, entry, self.args, self.stop_ids) for i, entry in enumerate(entries)
        ]

    @torch.no_grad()
    def logps(self) -> Tensor:
        """The policy's log-probs of both responses, (2, pairs): sums, or means per token, as the loss takes them.

        Each process scores every n-th pair, all of them equally many: forward is a common work where the policy is sharded.
        """
        n = self.rank_slice.count
        each = -(-len(self.pairs) // n)
        mine = list(itertools.islice(itertools.cycle(self.pairs), self.rank_slice.index, each * n, n))

        model = self.weights.wrapped
        was_training = model.training
        model.eval()

        size = self.args.per_device_eval_batch_size
        scores = [self._scores(mine[low : low + size]) for low in range(0, len(mine), size)]

        model.train(was_training)
        by_process = gather([torch.cat(scores, dim=1)])  # each (2, mine)
        return torch.stack(by_process, dim=2).flatten(1)[:, : len(self.pairs)]

    def _scores(self, pairs: list[Pair]) -> Tensor:
        with self.autocast():
            sums = self.scorer.response_sums(self.weights.wrapped, self.weights.policy, pairs, whole=True).cpu()

        if not self.loss.per_token:
            return sums

        tokens = [[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]]
        return sums / torch.tensor(tokens)

    def metrics(self) -> dict[str, float]:
        """Rewards and log-probs of the pairs as the policy is now.

        Raises:
            ValueError: there are no pairs.
        """
        if self.start_logps is None:
            raise ValueError("eval_dataset: held-out rows are needed to evaluate")

        now = self.logps()
        scale = 1.0 if self.loss.reward_scale is None else float(getattr(self.args, self.loss.reward_scale))
        chosen, rejected = scale * (now - self.start_logps)

        values = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "logps/chosen": now[0].mean(),
            "logps/rejected": now[1].mean(),
        }
        return {name: value.item() for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """The entries, and the start model's log-probs of their pairs."""
        if self.start_logps is None:
            return {}

        return {**pack(self.entries), "start_logps": self.start_logps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; rejected responses follow from the entries."""
        if not state:
            return

        self._make(unpack(state))
        self.start_logps = torch.as_tensor(state["start_logps"])
