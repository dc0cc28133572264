"""Every set of weights beside the policy's: the EMA, what the sampler has, and the reference.

Each is a whole model where the policy is whole in every process. Where the policy is sharded, or only an adapter is trained,
each is a list of parts instead (`sharding.py`), and takes the policy's place for its forward pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from components.common.generation.protocol import Canary, Sampler, make_canary
from components.common.models.loading import load_model, whole_models
from components.common.training.distributed.processes import is_main_process
from components.sapo.checkpoint import Parts, SavedParts
from components.sapo.config import SAPOConfig
from components.sapo.ema import EMA, copy_weights, frozen_copy, weights_of
from components.sapo.lora import merge_into, merged_weights
from components.sapo.sharding import Replicated, layout_of, read_parts, relative_distance, saved_parts


class PolicyWeights:
    """The policy's weights and all that follow them.

    Args:
        model: the policy, before a trainer wraps its forward: a later copy would run the policy's weights.
        args: settings.
        has_reference: whether the loss compares with a reference.

    Attributes:
        policy: the model that is trained, without what distributed training wraps around it.
        wrapped: what to call for its forward pass.
        layout: where the trained parameters lie.
        in_parts: whether the others are lists of parts.
        ema: the average; from the start of training on where it is in parts.
        ema_model, served_model, reference: models with the weights of the EMA, of what samples, and of the reference; None
            where there are parts instead, and `reference` where the loss needs none.
        reference_parts: the reference's weights, flat; empty where the loss needs none.
    """

    ema: EMA

    def __init__(self, model: PreTrainedModel, args: SAPOConfig, has_reference: bool) -> None:
        self.args = args
        self.has_reference = has_reference
        self.in_parts = args.is_sharded() or args.use_peft

        self.policy: Any = model
        self.wrapped: Any = model
        self.layout = Replicated(model, None)

        self.ema_model: nn.Module | None = None
        self.served_model: nn.Module | None = None
        self.reference: nn.Module | None = None
        self.reference_parts: list[Tensor] = []

        if not self.in_parts:
            self._copy_models(model)
        elif args.engine.serves_in_place:
            self.served_model = model if args.use_peft else _unsharded(model, args)

    def _copy_models(self, model: PreTrainedModel) -> None:
        """Models for the EMA, for what samples and for the reference."""
        device = self.args.device
        names = self.layout.names
        served_dtype = self.args.served_dtype()

        self.ema_model = frozen_copy(model).to(device)
        self.served_model = model if self.args.on_policy else self.ema_model
        copy_to_serve = None
        if served_dtype is not None:
            self.served_model = frozen_copy(model).to(device, served_dtype)
            copy_to_serve = weights_of(self.served_model, names)
        self.ema = EMA(weights_of(self.ema_model, names), self.args.ema_decay, copy_to_serve)

        if self.has_reference:
            self.reference = frozen_copy(model).to(device)
            self.reference_parts = weights_of(self.reference, names)

    def attach(self, wrapped: nn.Module, policy: nn.Module, optimizer: Any) -> None:
        """Takes the policy as accelerate has prepared it; from here on it is known where the trained parameters lie."""
        self.wrapped = wrapped
        self.policy = policy
        self.layout = layout_of(policy, optimizer)

        if self.in_parts:
            self._copy_parts()

    def _copy_parts(self) -> None:
        """The EMA and the reference as lists of parts, which start as the policy."""
        start = self.layout.parts()
        served_dtype = self.args.served_dtype()

        served = None if served_dtype is None else [part.to(served_dtype, copy=True) for part in start]
        self.ema = EMA([part.clone() for part in start], self.args.ema_decay, served)

        if self.has_reference:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            self.reference_parts = [part.to(dtype, copy=True) for part in start]
            if self.args.reference == "base":  # an adapter of zeros adds nothing
                torch._foreach_zero_(self.reference_parts)

    # ---- Line 17 of Algorithm 1 -----------------------------------------------------------------------------------

    def average(self, step: int) -> bool:
        """Updates the EMA after optimizer step `step`, every `ema_interval` steps (Eq. 6).

        Returns:
            whether the sampler is to get new weights.
        """
        served = False
        if step % self.args.ema_interval == 0:
            served = (self.ema.version + 1) % self.args.push_interval == 0
            self.ema.update(self.layout.parts(), serve=served)

        return served or self.args.on_policy

    def refresh_reference(self, step: int, steps_per_epoch: int) -> bool:
        """Copies the EMA, or the policy, to the reference at its interval; whether it did."""
        if not self.has_reference or self.args.reference not in ("ema", "policy"):
            return False
        if step % reference_interval(self.args, steps_per_epoch) != 0:
            return False

        source = self.ema.average if self.args.reference == "ema" else self.layout.parts()
        copy_weights(source, self.reference_parts)
        return True

    def distance(self) -> float:
        """|EMA - policy| / |policy| over all trained parameters."""
        return relative_distance(self.layout, self.ema.average, self.layout.parts())

    # ---- Forward passes with other weights than the policy's ------------------------------------------------------

    @contextmanager
    def reference_model(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """What to call for the reference's forward pass, and the model within it."""
        if self.reference is not None:
            yield self.reference, self.reference
            return

        with self.layout.swapped_in(self.reference_parts):
            yield self.wrapped, self.policy

    def serving(self) -> AbstractContextManager[None]:
        """Puts the EMA's adapter in place for an engine that runs the policy's own model."""
        in_turns = self.args.use_peft and self.args.engine.serves_in_place and not self.args.on_policy

        return self.layout.swapped_in(self.ema.serving) if in_turns else nullcontext()

    def push(self, sampler: Sampler, canary_ids: list[int] | None) -> None:
        """Gives the sampler the weights it is to serve.

        Args:
            canary_ids: tokens by which an engine with a copy of its own proves that it serves them; None: it has no copy.
        """
        if not self.in_parts:
            served: Any = self.served_model
            sampler.load(served.named_parameters(), self.ema.served_version, _canary(served, canary_ids))
            return

        parts = self.layout.parts() if self.args.on_policy else self.ema.serving
        with self.layout.swapped_in(parts):
            canary = _canary(self.wrapped, canary_ids)
            weights = merged_weights(self.policy) if self.args.use_peft else self.layout.weights(parts)
            in_place = self.args.use_peft and self.args.engine.serves_in_place
            sampler.load([] if in_place else weights, self.ema.served_version, canary)

    # ---- What is kept ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This process's parts of every set of weights, and how often the EMA was updated."""
        weights = {"policy": self.layout.parts(), "ema": self.ema.average}
        if self.has_reference:
            weights["reference"] = self.reference_parts
        if self.args.push_interval > 1:
            weights["served"] = self.ema.serving

        parts: dict[str, Parts] = {name: saved_parts(self.layout, tensors) for name, tensors in weights.items()}
        return {**parts, "version": self.ema.version, "served_version": self.ema.served_version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, whichever processes it is of.

        Raises:
            UserError: it is of another model.
        """
        ema = self.ema

        def read(name: str, like: list[Tensor]) -> list[Tensor]:
            saved: SavedParts = state[name]
            return read_parts(saved, self.layout, like)

        self.layout.load(read("policy", self.layout.parts()))
        copy_weights(read("ema", ema.average), ema.average)
        if ema.served is not None:
            served = read("served", ema.served) if self.args.push_interval > 1 else ema.average
            copy_weights(served, ema.served)
        if self.has_reference:
            copy_weights(read("reference", self.reference_parts), self.reference_parts)

        ema.version = state["version"]
        ema.served_version = state["served_version"]

    def save_policy(self, output: Path) -> None:
        """Writes the trained policy as a plain Hugging Face directory, one parameter at a time; all processes call this."""
        if self.args.use_peft and self.args.merge_adapter:
            if is_main_process():
                with whole_models():
                    base = load_model(str(self.policy.name_or_path))
                merge_into(base, self.policy)
                base.save_pretrained(output)
        elif self.layout.sharded:
            whole = self.layout.weights(self.layout.parts())
            weights = {name: weight.cpu() for name, weight in whole if is_main_process()}
            if is_main_process():
                self.policy.save_pretrained(output, state_dict=weights)
        elif is_main_process():
            self.policy.save_pretrained(output)


def reference_interval(args: SAPOConfig, steps_per_epoch: int) -> int:
    """Optimizer steps between refreshes of the reference."""
    return steps_per_epoch if args.reference_interval == "epoch" else int(args.reference_interval)


def _canary(model: Any, token_ids: list[int] | None) -> Canary | None:
    """What the weights to serve give, by the model that has them."""
    return None if token_ids is None else make_canary(model, token_ids)


def _unsharded(model: PreTrainedModel, args: SAPOConfig) -> nn.Module:
    """A whole copy of a model that is, or will be, sharded, for an engine that serves in place."""
    dtype = getattr(torch, args.engine_dtype())
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return frozen_copy(model).to(args.device, dtype)

    with whole_models():  # ZeRO-3 has sharded the policy as it was loaded
        whole = load_model(str(model.name_or_path), dtype)
    return whole.requires_grad_(False).eval().to(args.device)
