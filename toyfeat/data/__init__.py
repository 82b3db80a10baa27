"""Training data: shuffled batches, and a store of activations on disk."""

from toyfeat.data.batches import Batches, array_batches, store_batches
from toyfeat.data.store import Store, open_store, store_size, verify_store
from toyfeat.data.writing import store_writer

__all__ = [
    "Batches",
    "Store",
    "array_batches",
    "open_store",
    "store_batches",
    "store_size",
    "store_writer",
    "verify_store",
]
