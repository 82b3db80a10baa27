"""Shares of a store: shards that each of several processes writes.

All write into one folder, under the names that one process would give.  Each has a
record of its own; ``store.json`` appears when all shares are complete.
"""

import re
from pathlib import Path
from typing import NamedTuple

from toyfeat.data.format import RECORD, Store, is_shard_name

_KEY = "share"  # entry of the metadata of a record
_RECORD = re.compile(r"share-(\d+)-of-(\d+)\.json")


class Share(NamedTuple):
    """Rows of a store that one of several processes writes: whole shards in a row.

    Attributes:
      index: of the process.
      count: of the processes.
      total: rows of the store.
    """

    index: int
    count: int
    total: int

    @property
    def record(self) -> str:
        """Name of the record of the share."""
        return f"share-{self.index}-of-{self.count}.json"

    def first_shard(self, rows_per_shard: int) -> int:
        """Number of the first shard."""
        return -(-self.total // rows_per_shard) * self.index // self.count

    def rows(self, rows_per_shard: int) -> slice:
        """Rows of the store, from the first on to the one behind the last."""
        after = self._replace(index=self.index + 1).first_shard(rows_per_shard)
        start = self.first_shard(rows_per_shard) * rows_per_shard
        return slice(start, min(after * rows_per_shard, self.total))

    def mark(self, store: Store) -> Store:
        """Add the share to the metadata of its record."""
        return store._replace(metadata={**store.metadata, _KEY: list(self)})


def records(path: Path) -> list[tuple[int, str]]:
    """List the records of shares in a folder: number of processes, and name."""
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    matches = [_RECORD.fullmatch(name) for name in names]
    return [(int(match[2]), match[0]) for match in matches if match]


def check_count(path: Path, count: int, who: str) -> None:
    """Raise for shares that another number of processes began.

    Raises:
      ValueError: with both numbers.
    """
    for number, name in records(path):
        if number != count:
            raise ValueError(
                f"{who}: {path} was begun by {number} processes ({name}), got {count}; "
                f"go on with {number}, or give another folder"
            )


def check_no_shards(path: Path, who: str) -> None:
    """Raise a ValueError for shards without a record of them."""
    shards = [file.name for file in path.iterdir() if is_shard_name(file.name)]
    if shards:
        raise ValueError(
            f"{who}: {path} has {len(shards)} shards, such as {min(shards)}, and no "
            f"{RECORD} that records them; restore it, or give another folder"
        )
