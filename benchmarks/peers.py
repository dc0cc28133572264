"""Everything that the sides of a comparison import: they are forks of a process that has imported this."""

import logging

logging.disable(logging.WARNING)  # bitsandbytes tells of a kernel that it lacks when it is imported

from trl import DPOTrainer  # noqa: E402, F401
from trl.experimental.orpo import ORPOTrainer  # noqa: E402, F401

import benchmarks.iteration  # noqa: E402
import benchmarks.learner  # noqa: E402, F401
