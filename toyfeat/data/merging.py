"""Join the shares of a store that several processes wrote."""

from toyfeat.data.format import RECORD, Store, read_store
from toyfeat.data.shares import Share, check_count, check_no_shards, records
from toyfeat.data.store import check_shards
from toyfeat.data.writing import check_settings, replace_record


def is_complete(wanted: Store, total: int, count: int) -> bool:
    """Tell whether a store has all its rows, before several processes write it.

    Records of shares that a kill left beside a complete store are removed.

    Args:
      wanted: its settings.
      total: rows that it is to have.
      count: processes that are to write it.

    Returns:
      Whether nothing is left to write.

    Raises:
      ValueError: if it was begun with other settings, by one process or by another
        number of them, or if there are shards that no record tells of.
    """
    path = wanted.path
    if not (path / RECORD).exists():
        check_count(path, count, "store_writer")
        if path.is_dir() and not records(path):
            check_no_shards(path, "store_writer")
        return False
    store = read_store(path, "store_writer")
    check_settings(store, wanted)
    if store.rows != total:
        raise ValueError(
            f"store_writer: {path} was begun by one process and has {store.rows} of "
            f"{total} rows, got {count} processes; go on with one, or give another "
            "folder"
        )
    for _, name in records(path):
        (path / name).unlink()
    return True


def merge_shares(wanted: Store, total: int, count: int) -> Store:
    """Make ``store.json`` of the records of all shares.

    No shard is moved.  Records go after ``store.json`` is there, so that a kill in
    between loses nothing.

    Args:
      wanted: settings of the store.
      total: rows that it has.
      count: processes that wrote it.

    Returns:
      The whole store.

    Raises:
      ValueError: if a share is not complete.
      FileNotFoundError: if a shard or a record is missing.
    """
    shards, names = [], []
    for index in range(count):
        share = Share(index, count, total)
        part = read_store(wanted.path, "merge_shares", share.record)
        check_settings(part, share.mark(wanted))
        rows = share.rows(wanted.rows_per_shard)
        if part.rows != rows.stop - rows.start:
            raise ValueError(
                f"merge_shares: {wanted.path / share.record} must have "
                f"{rows.stop - rows.start} rows, got {part.rows}; collect again, "
                "which goes on there"
            )
        shards += part.shards
        names.append(share.record)
    whole = wanted._replace(shards=tuple(shards))
    check_shards(whole, "merge_shares")
    replace_record(whole, RECORD)
    for name in names:
        (wanted.path / name).unlink()
    return whole
