"""Directories and object storage alike, by obstore: list what is there, and put what is not there yet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE = 2**20  # least bytes of an object that are handed on at once


def open_store(where: str | os.PathLike):
    """Opens a directory, which is made if need be, or `s3://bucket/path`, `gs://bucket/path`, `az://container/path`.

    Settings of object storage come from the environment, as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL or
    GOOGLE_SERVICE_ACCOUNT. Do not use it in a forked process: obstore hangs there.

    Returns:
        a store of obstore.

    Raises:
        ValueError: obstore is not installed, or the address cannot be used.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url
    except ImportError:
        raise ValueError("shards need the package obstore: pip install -e '.[cloud]'") from None
    try:
        if is_url(where):
            options = {"allow_http": True} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:") else None
            return from_url(str(where), client_options=options)
        if not str(where):
            raise ValueError("no directory given for the shard set")
        return LocalStore(Path(where).expanduser(), mkdir=True)
    except (BaseError, OSError) as error:
        raise ValueError(f"{where}: cannot be opened: {_first_line(error)}") from error


def is_url(where: str | os.PathLike) -> bool:
    return "://" in str(where)


def names_in(store) -> list[str]:
    """The names of all objects, sorted.

    Raises:
        OSError: they cannot be listed.
    """
    return sorted(entry["path"] for entry in entries_in(store))


def entries_in(store) -> list[dict]:
    """All objects: dicts of path, size, last_modified and e_tag; raises like `names_in`."""
    import obstore
    from obstore.exceptions import BaseError

    try:
        return [entry for page in obstore.list(store) for entry in page]
    except BaseError as error:
        raise OSError(f"{store}: cannot be listed: {_first_line(error)}") from error


def pieces_of(store, name: str) -> tuple[int, Iterator[bytes]]:
    """(number of bytes of an object, its bytes in pieces).

    Raises:
        OSError: it cannot be read; NotThereError: trying again would not help.
    """
    import obstore

    with _errors_of(store, name):
        result = obstore.get(store, name)
        return result.meta["size"], _pieces(store, name, result)


def _pieces(store, name, result):
    with _errors_of(store, name):
        yield from map(bytes, result.stream(min_chunk_size=_PIECE))


def read_range(store, name: str, start: int, length: int) -> bytes:
    """Some bytes of an object; raises like `pieces_of`."""
    import obstore

    with _errors_of(store, name):
        return bytes(obstore.get_range(store, name, start=start, length=length))


class NotThereError(OSError):
    """There is no such object, or it may not be read."""


@contextmanager
def _errors_of(store, name):
    from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (NotFoundError, PermissionDeniedError, UnauthenticatedError, FileNotFoundError) as error:
        raise NotThereError(f"{store}: {name} cannot be read: {_first_line(error)}") from error
    except (BaseError, OSError) as error:
        raise OSError(f"{store}: {name} cannot be read: {_first_line(error)}") from error


def entry(store, name: str) -> dict:
    """The entry of an object, as of `entries_in`; raises like `pieces_of`."""
    import obstore

    with _errors_of(store, name):
        return obstore.head(store, name)


def exists(store, name: str) -> bool:
    """Whether there is an object of this name.

    Raises:
        OSError: the store does not answer.
    """
    import obstore
    from obstore.exceptions import BaseError, NotFoundError

    try:
        obstore.head(store, name)
        return True
    except (NotFoundError, FileNotFoundError):
        return False
    except BaseError as error:
        raise OSError(f"{store}: {name} cannot be looked up: {_first_line(error)}") from error


def read(store, name: str) -> tuple[bytes, dict]:
    """The bytes of an object, and its entry as of `entries_in`; raises like `pieces_of`."""
    import obstore

    with _errors_of(store, name):
        result = obstore.get(store, name)
        return bytes(result.bytes()), result.meta


def delete(store, names: list[str]) -> None:
    """Deletes objects, at most 1,000; those that are gone already are passed over.

    Raises:
        OSError: one cannot be deleted.
    """
    import obstore
    from obstore.exceptions import BaseError, NotFoundError

    try:
        obstore.delete(store, names)
    except (NotFoundError, FileNotFoundError):
        for name in names if len(names) > 1 else ():
            delete(store, [name])
    except (BaseError, OSError) as error:
        raise OSError(f"{store}: cannot delete: {_first_line(error)}") from error


def put_new(store, name: str, data: bytes) -> bool:
    """Writes an object whole, or not at all if there is one of this name.

    Returns:
        whether this call wrote it.

    Raises:
        OSError: it cannot be written.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        obstore.put(store, name, data, mode="create", use_multipart=False)
        return True
    except AlreadyExistsError:
        return False
    except (BaseError, OSError) as error:
        raise OSError(f"{store}: {name} cannot be written: {_first_line(error)}") from error


def _first_line(error):
    return str(error).strip().partition("\n")[0]
