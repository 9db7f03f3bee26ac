from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from isotune.subspace.cache import DEFAULT_MAX_BYTES, SubspaceCache
from isotune.subspace.solvers import Subspace, principal_subspace

SHAPE = (4, 64)


def example(seed: int = 0) -> Subspace:
    return principal_subspace(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)), 4)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    cache, stored = SubspaceCache(tmp_path / "new" / "folder"), example()
    assert cache.get("k", SHAPE) is None
    cache.put("k", stored)
    found = SubspaceCache(tmp_path / "new" / "folder").get("k", SHAPE)
    assert found is not None
    assert torch.equal(found.basis, stored.basis)
    assert torch.equal(found.singular_values, stored.singular_values)
    assert (found.energy, found.solver, found.iterations, found.converged) == (
        stored.energy,
        stored.solver,
        stored.iterations,
        stored.converged,
    )
    assert cache.get("other", SHAPE) is None


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[:-10])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one bit":
        content[-5] ^= 1
        path.write_bytes(content)
    elif kind == "header":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif kind == "foreign":
        save_file({"weight": torch.ones(3)}, path)
    elif kind == "no metadata":
        save_file({"basis": torch.ones(SHAPE), "singular_values": torch.ones(4)}, path)
    elif kind == "another shape":
        SubspaceCache(path.parent).put(path.stem, principal_subspace(torch.randn(64, 64), 3))
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("kind", ["truncated", "empty", "one bit", "header", "foreign", "no metadata", "another shape"])
def test_a_damaged_entry_is_removed_and_can_be_written_again(tmp_path: Path, kind: str) -> None:
    cache, stored = SubspaceCache(tmp_path), example()
    cache.put("k", stored)
    damage(tmp_path / "k.safetensors", kind)
    assert cache.get("k", SHAPE) is None
    assert entries(tmp_path) == []
    cache.put("k", stored)
    found = cache.get("k", SHAPE)
    assert found is not None
    assert torch.equal(found.basis, stored.basis)


def test_a_directory_in_an_entry_s_place_is_a_miss(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path)
    (tmp_path / "k.safetensors").mkdir()
    assert cache.get("k", SHAPE) is None
    cache.put("k", example())
    assert entries(tmp_path) == ["k.safetensors"]


def test_an_unusable_directory_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = SubspaceCache(tmp_path / "file" / "below")
    cache.put("k", example())
    assert cache.get("k", SHAPE) is None
    assert entries(tmp_path) == ["file"]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = SubspaceCache(tmp_path / "probe")
    size.put("k", example())
    length = (tmp_path / "probe" / "k.safetensors").stat().st_size
    cache = SubspaceCache(tmp_path / "bounded", max_bytes=3 * length + length // 2)
    for index, key in enumerate("abc"):
        cache.put(key, example(index))
        os.utime(tmp_path / "bounded" / f"{key}.safetensors", (index, index))
    assert cache.get("a", SHAPE) is not None  # now the most recently used
    cache.put("d", example(3))
    assert entries(tmp_path / "bounded") == ["a.safetensors", "c.safetensors", "d.safetensors"]


def test_an_entry_larger_than_the_bound_is_not_written(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path, max_bytes=100)
    cache.put("k", example())
    assert entries(tmp_path) == []


def test_what_a_killed_writer_left_is_cleared_and_a_live_one_s_is_not(tmp_path: Path) -> None:
    old, new = tmp_path / "x.1.partial", tmp_path / "x.2.partial"
    old.write_bytes(b"1")
    new.write_bytes(b"2")
    past = time.time() - 7200
    os.utime(old, (past, past))
    SubspaceCache(tmp_path).put("k", example())
    assert entries(tmp_path) == ["k.safetensors", "x.2.partial"]


def test_the_environment_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("ISOTUNE_CACHE_BYTES", "123456")
    assert (SubspaceCache().directory, SubspaceCache().max_bytes) == (tmp_path, 123456)
    for word in ("off", "0", "OFF"):
        monkeypatch.setenv("ISOTUNE_CACHE", word)
        cache = SubspaceCache()
        assert cache.directory is None
        cache.put("k", example())
        assert cache.get("k", SHAPE) is None
    monkeypatch.delenv("ISOTUNE_CACHE")
    monkeypatch.delenv("ISOTUNE_CACHE_BYTES")
    assert SubspaceCache().directory == Path.home() / ".cache" / "isotune" / "subspaces"
    assert SubspaceCache().max_bytes == DEFAULT_MAX_BYTES == 4 * 2**30
    monkeypatch.setenv("ISOTUNE_CACHE_BYTES", "4 GiB")
    with pytest.raises(ValueError, match=r"'4 GiB'.*whole number of bytes"):
        SubspaceCache()


def test_an_entry_evicted_while_it_is_opened_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evicted(path: Path, **_: object) -> None:  # what safetensors does second: map the file with torch
        path.unlink()
        torch.UntypedStorage.from_file(str(path), False, 64)

    cache = SubspaceCache(tmp_path)
    cache.put("k", example())
    monkeypatch.setattr("isotune.subspace.cache.safe_open", evicted)
    assert cache.get("k", SHAPE) is None


def _hammer(directory: str, failures: Any) -> None:
    torch.set_num_threads(1)
    stored = [example(seed) for seed in range(3)]
    cache = SubspaceCache(directory, max_bytes=3500)  # room for two of the three: eviction runs all the time
    for turn in range(60):
        seed = turn % 3
        cache.put(f"k{seed}", stored[seed])
        found = cache.get(f"k{seed}", SHAPE)
        if found is not None and not torch.equal(found.basis, stored[seed].basis):
            failures.put(f"turn {turn} read another basis")
    failures.put("done")


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), messages)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [messages.get(timeout=500) for _ in processes] == ["done", "done"]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert entries(tmp_path)
    assert not any(name.endswith(".partial") for name in entries(tmp_path))
