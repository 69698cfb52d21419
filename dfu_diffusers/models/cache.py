# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""A cache of tensors with a limit in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch


class TensorCache:
    """Keeps the most recently used results of a function, as many as fit. Thread-safe.

    Args:
        function: takes hashable arguments, and returns a tensor or a tuple of tensors.
        max_bytes: limit for all kept results together. A result that is larger is not kept.

    >>> cached = TensorCache(torch.zeros, max_bytes=8)
    >>> cached(2) is cached(2), cached(3) is cached(3)
    (True, False)
    """

    def __init__(self, function: Callable, max_bytes: int):
        self.function, self.max_bytes = function, max_bytes
        self._results: OrderedDict = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key):
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        with torch.inference_mode(False):  # a tensor made in inference mode could never serve training
            result = self.function(*key)
        if _bytes(result) <= self.max_bytes:
            with self._lock:
                self._results[key] = result
                while self.bytes > self.max_bytes:
                    self._results.popitem(last=False)
        return result

    @property
    def bytes(self) -> int:
        """Bytes of the results that are kept."""
        return sum(map(_bytes, self._results.values()))

    def clear(self) -> None:
        with self._lock:
            self._results.clear()


def _bytes(result) -> int:
    if isinstance(result, tuple):
        return sum(map(_bytes, result))
    return result.numel() * result.element_size() if torch.is_tensor(result) else 0
