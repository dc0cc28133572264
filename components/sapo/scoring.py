"""Log-probs of pairs by any model of the policy's architecture."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from components.common.kernels.pair_logps import (
    pair_logps,
    sequence_nll,
    shared_prefix_attention,
    supports_shared_prefix,
)
from components.common.kernels.pair_packing import PairBatch, collate, whole_sequences
from components.sapo.losses import PairLogps, PreferenceLoss
from components.sapo.pairs import MicroBatch, Pair


class PairScorer:
    """Collates pairs for a model, and takes from its log-probs what the loss compares.

    Args:
        model: the policy; says whether pairs of its architecture may be packed.
        loss: says which tokens count.
        pad_id: any token id; padding is masked.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, loss: PreferenceLoss, pad_id: int, device: torch.device) -> None:
        self.loss = loss
        self.pad_id = pad_id
        self.device = device
        self.packs = supports_shared_prefix(model)

    def attention(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Keep it open around forward and backward: with gradient checkpointing backward looks the attention up again."""
        return shared_prefix_attention(policy) if self.packs else nullcontext()

    def collate(self, pairs: Sequence[Pair], whole: bool = False) -> PairBatch:
        """Pairs for the model; what cancels in the loss is not scored, unless responses are wanted `whole`."""
        return collate(list(pairs), self.pad_id, self.packs, self.loss.shared_cancels and not whole)

    def policy_logps(
        self, wrapped: nn.Module, policy: nn.Module, micro_batch: MicroBatch, with_sequences: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The policy's log-probs of a micro-batch, in one forward pass.

        Args:
            wrapped: what distributed training has wrapped around the policy.
            micro_batch: on the policy's device.
            with_sequences: also L_SFT over prompt and chosen response.

        Returns:
            the log-prob of each response token, (2 * pairs, longest response), and L_SFT, (pairs,), if it was asked for.
        """
        batch = micro_batch.batch
        if not with_sequences:
            return pair_logps(wrapped, policy, [batch])[0], None

        prompts_and_chosen = [(pair.prompt, pair.chosen) for pair in micro_batch.pairs]
        sequences = whole_sequences(prompts_and_chosen, self.pad_id, self.packs).to(self.device)

        token_logps, of_sequences = pair_logps(wrapped, policy, [batch, sequences])
        return token_logps, sequence_nll(of_sequences, sequences)

    def response_sums(
        self, wrapped: nn.Module, policy: nn.Module, pairs: Sequence[Pair], whole: bool = False
    ) -> Tensor:
        """A model's log-probs of both responses, summed over their tokens, (2, pairs)."""
        batch = self.collate(pairs, whole).to(self.device)
        token_logps = pair_logps(wrapped, policy, [batch])[0]

        return torch.stack(token_logps.sum(dim=1).chunk(2))


def loss_inputs(
    token_logps: Tensor, batch: PairBatch, reference: Tensor | None = None, sequence_nll: Tensor | None = None
) -> PairLogps:
    """What a loss reads.

    Args:
        token_logps: (2 * pairs, longest response).
        batch: on the same device.
        reference: the reference's sums, (2, pairs).
        sequence_nll: L_SFT over prompt and chosen response, (pairs,).
    """
    chosen, rejected = token_logps.sum(dim=1).chunk(2)
    chosen_tokens, rejected_tokens = batch.response_mask.sum(dim=1).chunk(2)
    reference_chosen, reference_rejected = (None, None) if reference is None else reference.unbind()

    return PairLogps(
        chosen, rejected, chosen_tokens, rejected_tokens, reference_chosen, reference_rejected, sequence_nll
    )
