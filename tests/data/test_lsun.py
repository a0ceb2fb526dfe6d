"""LSUN: databases in its own layout, read by many workers and data sets at once, whole or not at all."""

import hashlib
import os
import pickle
import sys

import lmdb
import pytest
import torch
from photographs import crop, encoded
from torch.utils.data import DataLoader

from diffussm.data import lsun
from diffussm.data.decode import center_crop, decode
from diffussm.data.lsun import Lsun
from diffussm.runtime.errors import BadImage, ConfigError, DataError

COUNT = 24
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")


def make_lsun(directory, first: int, count: int = COUNT) -> dict[bytes, bytes]:
    """A category as LSUN has it: WebP under the SHA-1 of what it shows."""
    contents = [encoded(crop(index), "WEBP", quality=75) for index in range(first, first + count)]
    stored = {hashlib.sha1(content).hexdigest().encode(): content for content in contents}
    with lmdb.open(str(directory), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, content in stored.items():
            transaction.put(key, content)
    return dict(sorted(stored.items()))


@pytest.fixture(scope="module")
def bedroom(tmp_path_factory):
    path = tmp_path_factory.mktemp("lsun") / "bedroom_train_lmdb"
    return path, make_lsun(path, 0)


@pytest.fixture(scope="module")
def church(tmp_path_factory):
    path = tmp_path_factory.mktemp("lsun") / "church_outdoor_train_lmdb"
    return path, make_lsun(path, 100, 10)


def expected(content: bytes, resolution: int = 32) -> torch.Tensor:
    return torch.from_numpy(center_crop(decode(content), resolution)).permute(2, 0, 1)


def test_a_category_is_unlabelled_and_complete(bedroom):
    path, stored = bedroom
    source = Lsun(str(path), resolution=32)
    assert len(source) == COUNT and source.num_classes is None and source.class_names == []
    for index, (key, content) in enumerate(stored.items()):
        image, label = source[index]
        assert torch.equal(image, expected(content)) and label == -1
        assert source.name_of(index) == f"bedroom_train/{key.decode()}"
    with pytest.raises(IndexError):
        source[COUNT]


def test_categories_are_labelled_in_the_order_of_the_list(bedroom, church):
    source = Lsun([str(church[0]), str(bedroom[0])], resolution=32)
    assert source.class_names == ["church_outdoor_train", "bedroom_train"] and source.num_classes == 2
    assert [source[index][1] for index in range(len(source))] == [0] * 10 + [1] * COUNT
    contents = [*church[1].values(), *bedroom[1].values()]
    assert all(torch.equal(source[index][0], expected(content)) for index, content in enumerate(contents))


@MANY_WORKERS
def test_four_workers_read_what_this_process_reads(bedroom, church):
    both = Lsun([str(bedroom[0]), str(church[0])], resolution=32)
    here = list(both)  # so that workers start with an environment that is not theirs
    for _ in range(2):
        there = list(DataLoader(both, num_workers=4, batch_size=None))
        assert len(there) == len(here)
        for ours, theirs in zip(here, there, strict=True):
            assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    assert torch.equal(both[3][0], here[3][0])  # what workers closed was theirs


class Owners(Lsun):
    """Whose the environment is that an image is read from."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.content(index)
        return lsun._environments[self.paths[0].resolve()][0], os.getpid()


def test_every_worker_opens_its_own_environment(bedroom):
    source = Owners(str(bedroom[0]))
    assert source[0] == (os.getpid(), os.getpid())
    pairs = list(DataLoader(source, num_workers=2, batch_size=None))
    assert len(set(map(tuple, pairs))) == 2 and all(owner == reader != os.getpid() for owner, reader in pairs)


class Pairs:
    """Two data sets at once."""

    def __init__(self, first: Lsun, second: Lsun) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> bool:
        return torch.equal(self.first[index][0], expected(self.second.content(index)))


@MANY_WORKERS
@pytest.mark.parametrize("num_workers", [0, 4])
def test_two_data_sets_share_an_environment_in_any_process(bedroom, num_workers):
    pairs = Pairs(Lsun(str(bedroom[0]), resolution=32), Lsun(str(bedroom[0]), resolution=16))
    assert list(DataLoader(pairs, num_workers=num_workers, batch_size=None)) == [True] * COUNT


def test_it_opens_nothing_before_it_is_used_and_pickles_without_what_it_opened(tmp_path, monkeypatch):
    make_lsun(tmp_path / "cat_lmdb", 0, 5)
    opened = set(lsun._environments)
    with monkeypatch.context() as closed:
        closed.setattr(lmdb, "open", None)
        source = Lsun(str(tmp_path / "cat_lmdb"), resolution=32)
        again = pickle.loads(pickle.dumps(source))
        assert set(lsun._environments) == opened
    assert len(source) == len(again) == 5 and len(lsun._environments) == len(opened) + 1
    used = pickle.loads(pickle.dumps(source))
    assert used.fingerprint == source.fingerprint and torch.equal(used[3][0], source[3][0])


def test_the_fingerprint_follows_keys_and_categories_not_the_place(bedroom, church, tmp_path):
    moved = tmp_path / "elsewhere" / "bedroom_train_lmdb"
    moved.parent.mkdir()
    moved.symlink_to(bedroom[0])
    fingerprint = Lsun(str(bedroom[0])).fingerprint
    assert Lsun(str(moved)).fingerprint == fingerprint and str(tmp_path) not in str(fingerprint)
    assert Lsun(str(church[0])).fingerprint["keys_sha256"] != fingerprint["keys_sha256"]
    both = [Lsun(paths).fingerprint for paths in ([str(moved), str(church[0])], [str(church[0]), str(moved)])]
    assert both[0] != both[1]


def test_a_damaged_image_is_named_by_its_key(tmp_path):
    stored = make_lsun(tmp_path / "cat", 0, 3)
    key = list(stored)[1]
    with lmdb.open(str(tmp_path / "cat"), map_size=2**24) as environment, environment.begin(write=True) as writing:
        writing.put(key, stored[key][: len(stored[key]) // 2])
    source = Lsun(str(tmp_path / "cat"), resolution=32)
    assert source[0][0].shape == source[2][0].shape == (3, 32, 32)
    with pytest.raises(BadImage) as caught:
        source[1]
    assert caught.value.name == source.name_of(1) == f"cat/{key.decode()}"


def test_a_download_that_was_cut_off_is_refused_before_it_kills(tmp_path):
    make_lsun(tmp_path / "cat_lmdb", 0)
    data = tmp_path / "cat_lmdb" / "data.mdb"
    size = data.stat().st_size
    os.truncate(data, size - 8192)
    with pytest.raises(DataError, match=rf"data\.mdb has {size - 8192:,} of {size:,} bytes: download it again"):
        len(Lsun(str(tmp_path / "cat_lmdb")))


def test_what_is_no_database_is_one_line(tmp_path):
    for name, content in (("text_lmdb", b"hello, world" * 1000), ("short_lmdb", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
        with pytest.raises(DataError, match=r"data\.path=.*_lmdb: cannot be opened \(.*\): download") as caught:
            len(Lsun(str(tmp_path / name)))
        assert "\n" not in str(caught.value)
    lmdb.open(str(tmp_path / "void_lmdb")).close()
    with pytest.raises(DataError, match="void_lmdb: holds no images"):
        len(Lsun(str(tmp_path / "void_lmdb")))


def test_paths_that_cannot_be_are_refused_at_once(bedroom, tmp_path):
    with pytest.raises(DataError, match=r"data\.path=.*nowhere: no data\.mdb there"):
        Lsun(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="bedroom_train is listed 2 times"):
        Lsun([str(bedroom[0]), str(bedroom[0])])
    with pytest.raises(ValueError, match=r"path=\[\]"):
        Lsun([])


def test_without_lmdb_the_extra_is_named(bedroom, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffussm\[lsun\]'"):
        Lsun(str(bedroom[0]))
