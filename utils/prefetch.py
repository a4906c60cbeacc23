"""Computes results in advance in threads, with a bound on the pixels that are held at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from utils.distributed import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
PIXELS_AHEAD = 64_000_000  # of images that are read in advance


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    pixels: Callable[[Item], int] = lambda item: 0,
    most: int = PIXELS_AHEAD,
    threads: int | None = None,
    drain: bool = False,
) -> Iterator[Result]:
    """Yield function(item) for every item, in order. Threads compute some results in advance.

    Iterators of this kind can follow each other, as the steps of a pipeline.

    Args:
        ahead: most items in advance; 0 computes each one when it is asked for, in the thread that asks.
        pixels: size of an item.
        most: most pixels in advance; a larger item is computed alone.
        threads: None: as many as there are cores.
        drain: if `items` fails, first yield the results of the items before, which have been begun.
    """
    if ahead == 0:
        yield from map(function, items)
        return
    items, following, failure = iter(items), None, None
    waiting: deque = deque()
    held = 0
    with ThreadPoolExecutor(min(ahead, threads or usable_cores())) as pool:
        try:
            while True:
                taken = 0
                # One item, at least, is taken for each that is yielded. More could be waited for in vain.
                while failure is None and len(waiting) < ahead and not (taken and waiting[0][0].done()):
                    if following is None:
                        try:
                            item = next(items, None)
                        except BaseException as error:
                            if not drain:
                                raise
                            failure = error
                            break
                        if item is None:
                            break
                        following = item, pixels(item)
                    if waiting and held + following[1] > most:
                        break
                    waiting.append((pool.submit(function, following[0]), following[1]))
                    held, taken, following = held + following[1], taken + 1, None
                if not waiting and failure is not None:
                    raise failure
                if not waiting:
                    return
                future, size = waiting.popleft()
                result = future.result()
                held -= size
                yield result
        finally:
            # After an error or Ctrl-C nobody wants the rest.
            pool.shutdown(wait=False, cancel_futures=True)


def groups(items: Iterable[Item], count: int, pixels: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Groups of up to `count` consecutive items with up to `most` pixels together; a larger item is alone.

    An item is not waited for when its group is full.

    Example:
        >>> list(groups([1, 2, 3, 9, 1], 3, lambda item: item, most=5))
        [[1, 2], [3], [9], [1]]
    """
    group: list[Item] = []
    held = 0
    for item in items:
        size = pixels(item)
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(item)
        held += size
        if len(group) == count:
            yield group
            group, held = [], 0
    if group:
        yield group
