"""LSUN as it is distributed: an LMDB per category, of encoded images under their keys."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffussm.data.images import Photographs
from diffussm.data.packed import PackedStrings
from diffussm.runtime.errors import ConfigError, DataError

_environments: dict[Path, tuple[int, Any]] = {}  # by real path: the process that opened it, and lmdb's Environment


class Lsun(Photographs):
    """One category of LSUN, unlabelled, or several, labelled in the order in which they are listed.

    Args:
        path: the `..._lmdb` directory, or a list of them.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        resolution: int = 256,
        horizontal_flip: bool = True,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(resolution, horizontal_flip, max_bad_fraction)
        _import_lmdb()
        self.paths = [Path(one).expanduser() for one in ([path] if isinstance(path, str | Path) else path)]
        if not self.paths:
            raise ValueError("path=[]: needs at least one directory")
        for one in self.paths:
            if not (one / "data.mdb").is_file():
                raise DataError(f"data.path={one}: no data.mdb there: give LSUN's ..._lmdb directory, or several")
        self.categories = [one.absolute().name.removesuffix("_lmdb") for one in self.paths]
        name, times = Counter(self.categories).most_common(1)[0]
        if times > 1:
            raise DataError(f"data.path: {name} is listed {times} times: list every category once")

    @property
    def class_names(self) -> list[str]:
        """The categories, if there are several."""
        return self.categories if len(self.categories) > 1 else []

    @cached_property
    def _keys(self) -> list[PackedStrings]:
        return [_read_keys(path) for path in self.paths]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.array(list(accumulate(map(len, self._keys))))

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The categories and their keys."""
        keys = hashlib.sha256()
        for category, packed in zip(self.categories, self._keys, strict=True):
            keys.update(f"{category} {len(packed)}\n".encode())
            for index in range(len(packed)):
                keys.update(packed[index] + b"\n")
        return {"source": "lsun", "categories": self.categories, "keys_sha256": keys.hexdigest()}

    def name_of(self, index: int) -> str:
        """Category and key."""
        category, key = self._find(index)
        return f"{self.categories[category]}/{key.decode('ascii', 'backslashreplace')}"

    def content(self, index: int) -> bytes:
        """What is stored under the key, WebP in LSUN."""
        category, key = self._find(index)
        with _environment(self.paths[category]).begin() as transaction:
            return transaction.get(key)

    def label(self, index: int) -> int:
        """The number of its category."""
        return self._find(index)[0] if len(self.categories) > 1 else -1

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, bytes]:
        index = range(len(self))[index]
        category = int(self._ends.searchsorted(index, side="right"))
        return category, self._keys[category][index - int(self._ends[category])]  # counted from its end


def _read_keys(path: Path) -> PackedStrings:
    """All keys in their order; the images themselves are not touched."""
    with _environment(path).begin() as transaction, transaction.cursor() as cursor:
        keys = PackedStrings(cursor.iternext(keys=True, values=False))
    if not len(keys):
        raise DataError(f"data.path={path}: holds no images")
    return keys


def _environment(path: Path) -> Any:
    """The one environment of this process for a directory: lmdb refuses to open it twice."""
    path = path.resolve()
    process, environment = _environments.get(path, (0, None))
    if process != os.getpid():
        if environment is not None:  # came with a fork, and would keep us from opening our own
            environment.close()
        environment = _open(path)
        _environments[path] = (os.getpid(), environment)
    return environment


def _open(path: Path) -> Any:
    lmdb = _import_lmdb()
    try:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"data.path={path}: cannot be opened ({error}): download it again") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < needed:  # to read beyond its end would kill the process
        environment.close()
        raise DataError(f"data.path={path}: data.mdb has {size:,} of {needed:,} bytes: download it again")
    return environment


def _import_lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise ConfigError("data=lsun needs lmdb: pip install 'diffussm[lsun]'") from None
    return lmdb
