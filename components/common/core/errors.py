"""The exception that means "the user can mend this", and how stages end: 0, 2 after a UserError, 143 after SIGTERM."""

TERMINATED = 143  # 128 + SIGTERM: a retry policy sees a failure, and its retry resumes


class UserError(Exception):
    """Wrong input, settings or environment. The message says what was wrong, where, and what to do about it."""
