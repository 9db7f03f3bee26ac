"""Models of packages: one put together from parts is made once, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from isotune.errors import AdapterFileError
from isotune.files.base_model import diffusers_class, gguf_of, pipeline_of, resolve_base
from isotune.files.diffusion.single import with_config

PACKAGE = """
calls = []

def assemble(path):
    calls.append(path)
    path.write_bytes(b"half")
    if len(calls) == 1:
        raise OSError("no room")
    path.write_bytes(b"whole")
    return path
"""


def test_a_gguf_package_is_assembled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "parts_of_a_model.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OSError, match="no room"):
        resolve_base("package:parts_of_a_model")
    folder = Path(resolve_base("package:parts_of_a_model"))
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    assert (folder / "model.gguf").read_bytes() == b"whole"
    assert resolve_base("package:parts_of_a_model") == str(folder)
    assert len(sys.modules["parts_of_a_model"].calls) == 2
    assert gguf_of(str(folder)) == {"gguf_file": "model.gguf"}
    assert resolve_base(str(folder)) == str(folder)  # what an adapter's config names
    (folder / "other.gguf").touch()
    with pytest.raises(ValueError, match="holds no model"):
        resolve_base(str(folder))


@pytest.mark.parametrize("content", ["[1]", "nonsense", "[" * 100_000])
def test_a_damaged_description_of_a_diffusers_model_is_named(content: str, tmp_path: Path) -> None:
    for name in ("config.json", "model_index.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .*again"):
        diffusers_class(str(tmp_path))
    with pytest.raises(ValueError, match=r"model_index\.json .*again"):
        pipeline_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json .*again"):
        with_config(tmp_path / "adapter_model.safetensors")
