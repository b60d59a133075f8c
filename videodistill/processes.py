"""Manners of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading


def follow_parent() -> None:
    """In a worker: end with the parent process, even when that is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
