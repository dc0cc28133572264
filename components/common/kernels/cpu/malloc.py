"""How the C library keeps the memory that a step frees."""

import ctypes

import torch


def keep_freed_memory() -> None:
    """On a CPU, keeps the memory that a step frees for the next one.

    glibc gives big blocks back to the system at once, and taking them again costs page faults: a third of a step in bfloat16.
    """
    libc = ctypes.CDLL(None)
    if not torch.cuda.is_available() and hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        libc.mallopt(trim_threshold, -1)  # never trim
        libc.mallopt(mmap_max, 0)  # no block outside the heap
