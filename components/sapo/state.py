"""Which run a checkpoint is of: its settings, its data, and the versions that made it."""

from collections.abc import Sequence
from pathlib import Path

from components.common.core.identity import Identity, digest_of_rows, identity_of, refuse_other_run, roles_of
from components.common.models.chat_templates import EncodedRow
from components.common.models.loading import model_digest
from components.common.stage.inputs import contents
from components.common.training.log import library_versions
from components.common.training.roles import spread
from components.sapo.checkpoint import CheckpointReader
from components.sapo.config import SAPOConfig

COLUMNS = ("prompt_ids", "chosen_ids")


def identity(
    args: SAPOConfig, rows: Sequence[EncodedRow], held_out: Sequence[EncodedRow] | None, start_model: str
) -> Identity:
    """What must be equal for a checkpoint to be of this run: settings, data, start model; and versions, for the record.

    Args:
        start_model: its directory; a name that is none is not compared.
    """
    model = Path(start_model)
    inputs = {
        "training rows": digest_of_rows(rows, COLUMNS),
        "held-out rows": digest_of_rows(held_out or [], COLUMNS),
        "start model": model_digest(model),
        **contents(vars(args), roles_of(SAPOConfig)),
    }
    derived = spread(args, args.world_size) | args.settled()
    return identity_of([args], inputs, derived, versions=library_versions())


def check_identity(reader: CheckpointReader, mine: Identity) -> None:
    """Raises UserError when the checkpoint is of another run, naming every setting that differs."""
    refuse_other_run(reader.directory, reader.json("settings"), mine)
