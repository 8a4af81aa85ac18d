"""Counts the memory of all tensors that operations see."""

import gc
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SET = torch.ops.aten.set_.source_Storage_storage_offset
"""With it torch.load makes a tensor of a storage."""


class HeldBytes(TorchDispatchMode):
    """Counts live bytes, each storage once, from the first operation that reads or makes it.

    So weights count that are mapped from a file by safetensors, which no operation makes, or by
    torch.load, once they are read.

    Attributes:
        now: Bytes that are live.
        peak: The most that were live at any moment.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._count((args, kwargs))
        output = func(*args, **(kwargs or {}))
        self._count(output, maps=func is SET)
        return output

    def _count(self, tree, maps=False):
        for tensor in (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if maps and not storage.resizable():
                continue  # a part of a file
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and tensor.device.type != "meta":
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size


@contextmanager
def no_garbage_collection():
    """Only reference counts free objects until the context is left."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
