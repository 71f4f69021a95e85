"""Reading and decoding images in threads, a bounded number of them ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fedprompt.runtime.machine import cpu_count

DECODE_THREADS = min(8, cpu_count())
"""Threads that decode images. More than eight do not help: the encoder is then the slower part."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Generator[Result]:
    """Apply a function to items in threads, and yield the results in the order of the items.

    Threads suffice for images, since Pillow releases the interpreter's lock while it decodes.

    Args:
        function: called from several threads.
        items: its arguments, taken one by one.
        ahead: how many items may be in work or finished before their result is asked for. This
            bounds the memory, whatever the number of items.

    Yields:
        One result per item. An exception of the function is raised in place of its result.
    """
    pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an error or Ctrl-C, items that are still queued must not be waited for.
        pool.shutdown(cancel_futures=True)
