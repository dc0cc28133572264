"""What a stage's settings are declared with, and what a stage says of itself to those who store its output."""

import dataclasses
from typing import Any, ClassVar

from components.common.core.identity import Role

REQUIRED: Any = dataclasses.MISSING


def setting(default: Any, help: str, paper: str | None = None, role: Role | None = None) -> Any:
    """A config field.

    Args:
        default: `REQUIRED` for none.
        help: what it means, with its unit.
        paper: the paper's value.
        role: what the result has to do with it; None: see `components.common.core.identity.roles_of`.
    """
    metadata = {"help": help, "paper": paper, "role": role}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumption:
    """How a stage goes on after an interruption, for what keeps its output in a bucket meanwhile.

    Attributes:
        marker: the file that the stage writes last: into a checkpoint of `OUTPUT/checkpoints`, or, where the output can be sent
            at any moment, into the output.
        from_output: whether it goes on from what is in its output, also where there is no checkpoint. For others that is in
            the way.
        at_any_moment: whether its output can be sent as it is at any moment; else checkpoints are sent.
        log: the setting that names the directory of its curves, which go with a checkpoint, and where in the output it is by
            default.
        extends: the setting that has it go on in a complete output, with another scope.
    """

    marker: str
    from_output: bool = False
    at_any_moment: bool = False
    log: tuple[str, str] | None = None
    extends: str | None = None


@dataclasses.dataclass(kw_only=True)
class StageConfig:
    """Settings that every stage has."""

    # None for a stage that is through in minutes, and begins anew. Of a stage's config classes the last that says it counts.
    resumption: ClassVar[Resumption | None] = None

    output: str = setting(
        REQUIRED,
        "Directory to write to, or s3://; made if missing, refused if it holds files.",
        role=Role.OUTPUT_DIRECTORY,
    )
    overwrite: bool = setting(False, "Empty the output directory first instead of refusing it.", role=Role.OPERATION)
    dry_run: bool = setting(False, "Check inputs and settings, print the plan, write nothing.", role=Role.OPERATION)
    executor_input: str | None = setting(
        None, "KFP's executor input (JSON, `{{$}}` in a component); set by KFP.", role=Role.OPERATION
    )
    mirror_bandwidth: float | None = setting(
        None,
        "Output in s3://: most MB a second for checkpoints sent while training goes on; none: no limit.",
        role=Role.OPERATION,
    )
    mirror_keep: int = setting(
        2, "Output in s3://: complete checkpoints kept in the bucket while the run lasts.", role=Role.OPERATION
    )
    grace_seconds: float = setting(
        20.0, "Output in s3://: seconds for sending the last checkpoint after a SIGTERM.", role=Role.OPERATION
    )
    lease_seconds: float = setting(
        60.0, "Output in s3://: a process that is silent this long (s) has lost the output.", role=Role.OPERATION
    )

    @classmethod
    def inputs_named(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings as they were given, with those inputs in place that other settings name or choose.

        It is asked before anything is fetched or built, and leaves alone what cannot work, for the checks of the class.
        """
        return values
