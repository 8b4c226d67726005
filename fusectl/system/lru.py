"""Arrays that are costly to make, kept for those that want them again soon."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy.typing as npt


Array = npt.NDArray[Any]


class Cache:
    """The arrays that were wanted last, as many as `most_bytes` hold, and one at least."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, Array] = OrderedDict()
        # Of two threads that want one, one makes it.
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """The array of a key, made anew if it is not there any more."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                values = self._kept.get(key)
                if values is not None:
                    self._kept.move_to_end(key)
            if values is None:
                values = make()
                with self._lock:
                    self._kept[key] = values
                    while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > self._most_bytes:
                        self._kept.popitem(last=False)
        return values
