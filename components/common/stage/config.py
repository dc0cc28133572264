"""What a stage's settings are declared with."""

import dataclasses
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def setting(default: Any, help: str, paper: str | None = None) -> Any:
    """A config field: its default (`REQUIRED` for none), what it means with its unit, and the paper's value."""
    metadata = {"help": help, "paper": paper}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclasses.dataclass(kw_only=True)
class StageConfig:
    """Settings that every stage has."""

    output: str = setting(REQUIRED, "Directory to write to, or s3://; made if missing, refused if it holds files.")
    overwrite: bool = setting(False, "Empty the output directory first instead of refusing it.")
    dry_run: bool = setting(False, "Check inputs and settings, print the plan, write nothing.")
    executor_input: str | None = setting(None, "KFP's executor input (JSON, `{{$}}` in a component); set by KFP.")
    mirror_bandwidth: float | None = setting(
        None, "Output in s3://: most MB a second for checkpoints sent while training goes on; none: no limit."
    )
    mirror_keep: int = setting(2, "Output in s3://: complete checkpoints kept in the bucket while the run lasts.")
    grace_seconds: float = setting(20.0, "Output in s3://: seconds for sending the last checkpoint after a SIGTERM.")
    lease_seconds: float = setting(60.0, "Output in s3://: a process that is silent this long (s) has lost the output.")
