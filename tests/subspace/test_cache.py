from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from isotune.subspace.cache import DEFAULT_MAX_BYTES, SubspaceCache, spans
from isotune.subspace.result import Subspace, SubspaceRequest
from isotune.subspace.solvers import principal_subspace, principal_subspaces
from scripts import copies

SHAPE = (4, 64)


def key_of(name: str) -> str:
    """A key as `subspace_key` makes them: the cache knows its own files by their names."""
    return hashlib.blake2b(name.encode(), digest_size=32).hexdigest()


K = key_of("k")
ENTRY = f"{K}.safetensors"


def example(seed: int = 0) -> Subspace:
    return principal_subspace(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)), 4)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    cache, stored = SubspaceCache(tmp_path / "new" / "folder"), example()
    assert cache.get(K, SHAPE) is None
    cache.put(K, stored)
    found = SubspaceCache(tmp_path / "new" / "folder").get(K, SHAPE)
    assert found is not None
    assert torch.equal(found.basis, stored.basis)
    assert torch.equal(found.singular_values, stored.singular_values)
    assert (found.energy, found.solver, found.iterations) == (
        stored.energy,
        stored.solver,
        stored.iterations,
    )
    assert cache.get(key_of("other"), SHAPE) is None


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
    cache.put(K, stored)
    damage(tmp_path / ENTRY, kind)
    assert cache.get(K, SHAPE) is None
    assert entries(tmp_path) == []
    cache.put(K, stored)
    found = cache.get(K, SHAPE)
    assert found is not None
    assert torch.equal(found.basis, stored.basis)


def test_a_directory_in_an_entry_s_place_is_a_miss(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path)
    (tmp_path / ENTRY).mkdir()
    assert cache.get(K, SHAPE) is None
    cache.put(K, example())
    assert entries(tmp_path) == [ENTRY]


def test_an_unusable_directory_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = SubspaceCache(tmp_path / "file" / "below")
    cache.put(K, example())
    assert cache.get(K, SHAPE) is None
    assert entries(tmp_path) == ["file"]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = SubspaceCache(tmp_path / "probe")
    size.put(K, example())
    length = (tmp_path / "probe" / ENTRY).stat().st_size
    cache = SubspaceCache(tmp_path / "bounded", max_bytes=3 * length + length // 2)
    a, b, c, d = map(key_of, "abcd")
    for index, key in enumerate((a, b, c)):
        cache.put(key, example(index))
        os.utime(tmp_path / "bounded" / f"{key}.safetensors", (index, index))
    assert cache.get(a, SHAPE) is not None  # now the most recently used
    cache.put(d, example(3))
    assert entries(tmp_path / "bounded") == sorted(f"{key}.safetensors" for key in (a, c, d))


def test_an_entry_larger_than_the_bound_is_not_written(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path, max_bytes=100)
    cache.put(K, example())
    assert entries(tmp_path) == []


def test_what_a_killed_writer_left_is_cleared_and_a_live_one_s_is_not(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{key_of('x')}.{turn * 32}.partial" for turn in "12")
    old.write_bytes(b"1")
    new.write_bytes(b"2")
    past = time.time() - 7200
    os.utime(old, (past, past))
    SubspaceCache(tmp_path).put(K, example())
    assert entries(tmp_path) == sorted([ENTRY, new.name])


def test_the_environment_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("ISOTUNE_CACHE_BYTES", "123456")
    assert (SubspaceCache().directory, SubspaceCache().max_bytes) == (tmp_path, 123456)
    for word in ("off", "0", "OFF"):
        monkeypatch.setenv("ISOTUNE_CACHE", word)
        cache = SubspaceCache()
        assert cache.directory is None
        cache.put(K, example())
        assert cache.get(K, SHAPE) is None
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
    cache.put(K, example())
    monkeypatch.setattr("isotune.subspace.cache.safe_open", evicted)
    assert cache.get(K, SHAPE) is None


def _hammer(directory: str, failures: Any) -> None:
    torch.set_num_threads(1)
    stored = [example(seed) for seed in range(3)]
    cache = SubspaceCache(directory, max_bytes=3500)  # room for two of the three: eviction runs all the time
    for turn in range(60):
        seed = turn % 3
        cache.put(key_of(f"k{seed}"), stored[seed])
        found = cache.get(key_of(f"k{seed}"), SHAPE)
        if found is not None and not torch.equal(found.basis, stored[seed].basis):
            failures.put(f"turn {turn} read another basis")
    failures.put("done")


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = copies()
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


# -- files of others ---------------------------------------------------------------------------------------------------


def test_nothing_but_its_own_files_is_ever_removed(tmp_path: Path) -> None:
    past = time.time() - 7200
    others = ["model.safetensors", "thesis.partial", "notes.txt", f"{'z' * 64}.safetensors", f"{'0' * 63}.safetensors"]
    others += [f"{'0' * 64}.partial", f"x{'0' * 64}.{'1' * 32}.partial", "a.safetensors.partial"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(5000))
    save_file({"weight": torch.ones(3000)}, tmp_path / f"{'0' * 64}.safetensors")  # a name as ours, and no entry
    save_file({"basis": torch.ones(SHAPE), "singular_values": torch.ones(4)}, tmp_path / f"{'1' * 64}.safetensors")
    others += [f"{'0' * 64}.safetensors", f"{'1' * 64}.safetensors"]
    (tmp_path / f"{'2' * 64}.safetensors").mkdir()
    (tmp_path / f"{'3' * 64}.safetensors").symlink_to(tmp_path / "model.safetensors")
    others += [f"{'2' * 64}.safetensors", f"{'3' * 64}.safetensors"]
    for name in others:
        os.utime(tmp_path / name, (past, past))
    cache = SubspaceCache(tmp_path, max_bytes=3000)
    for index in range(4):
        cache.put(key_of(str(index)), example(index))
    left = entries(tmp_path)
    assert set(others) <= set(left)
    assert f"{key_of('0')}.safetensors" not in left


# -- entries of another weight -----------------------------------------------------------------------------------------


def weight_of(seed: int, out: int = 48, width: int = 64) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["full", "lowrank"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (300, 200), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-4])
def test_an_honest_entry_is_believed(
    solver: str, shape: tuple[int, int], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    weight = weight_of(0, *shape).to(dtype)
    found = principal_subspace(weight, 6, solver=solver, tolerance=tolerance)
    assert spans(found, weight, tolerance)
    cache = SubspaceCache(tmp_path)
    cache.put(K, found)
    assert cache.get(K, (6, shape[1]), weight=weight, tolerance=tolerance) is not None


@pytest.mark.parametrize("weight", [torch.zeros(9, 7), torch.ones(9, 7), weight_of(1) * 1e-20, weight_of(1) * 1e20])
def test_weights_of_low_rank_and_of_any_size_are_believed(weight: torch.Tensor) -> None:
    assert spans(principal_subspace(weight, 3), weight)


def test_an_entry_of_another_weight_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    weight, other = weight_of(0), weight_of(7)
    expected = principal_subspace(weight, 4)
    cache = SubspaceCache(tmp_path)
    principal_subspaces([SubspaceRequest(weight, 4)], cache=cache)
    (entry,) = tmp_path.iterdir()
    for wrong in (principal_subspace(other, 4), replace(expected, singular_values=expected.singular_values * 1.01)):
        cache.put(entry.stem, wrong)
        assert cache.get(entry.stem, SHAPE) is not None  # well formed
        (found,) = principal_subspaces([SubspaceRequest(weight, 4)], cache=cache)
        assert torch.equal(found.basis, expected.basis)
        assert torch.equal(load_file(entry)["basis"], expected.basis)  # and written again


@pytest.mark.parametrize(
    "change",
    [
        lambda basis, values: (basis * 7, values * 7),
        lambda basis, values: (basis.flip(0), values),
        lambda basis, values: (basis.flip(0), values.flip(0)),
        lambda basis, values: (torch.cat([basis[:1], basis[:1], basis[2:]]), values),
        lambda basis, values: (torch.cat([basis[:3], torch.eye(64)[:1]]), values),
        lambda basis, values: (basis * torch.nan, values),
        lambda basis, values: (basis, values * torch.nan),
    ],
)
def test_what_is_no_subspace_of_the_weight(change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    weight = weight_of(0)
    honest = principal_subspace(weight, 4)
    basis, values = change(honest.basis, honest.singular_values)
    assert spans(honest, weight)
    assert not spans(replace(honest, basis=basis, singular_values=values), weight)


# -- what is no regular file -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.timeout(60)
def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    cache = SubspaceCache(tmp_path, max_bytes=3000)
    os.mkfifo(tmp_path / ENTRY)
    assert cache.get(K, SHAPE) is None
    cache.put(K, example())
    assert cache.get(K, SHAPE) is None
    for index in range(4):
        cache.put(key_of(str(index)), example(index))
    assert stat.S_ISFIFO((tmp_path / ENTRY).stat().st_mode)


def test_an_entry_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    cache, stored = SubspaceCache(tmp_path), example()
    cache.put(K, stored)
    with safe_open(tmp_path / ENTRY, framework="pt") as file:
        metadata = {**file.metadata(), "converged": "1"}
    save_file(load_file(tmp_path / ENTRY), tmp_path / ENTRY, metadata=metadata)
    found = cache.get(K, SHAPE)
    assert found is not None
    assert torch.equal(found.basis, stored.basis)
