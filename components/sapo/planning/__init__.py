"""What a run would do and need, worked out before any weight is loaded."""
