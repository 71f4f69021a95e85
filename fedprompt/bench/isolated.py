"""A fresh process for one measurement, so that earlier ones do not affect its peak memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in a new process with as many threads as this one.

    The function must be importable; its arguments and result are pickled.
    """
    # spawn: a forked process would inherit this one's memory.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()
