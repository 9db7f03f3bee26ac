"""Writes the folders beside it, with eigentune 0.2.0: what it saves of each kind, and what its own loaded model gives.

Run with a Python that has eigentune and what isotune's tests need: python tests/data/eigentune/make.py
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from eigentune import EigenTuneConfig, get_eigentune_model, load_adapter, save_adapter
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from files.test_stored_versions import Base, inputs

CASES: dict[str, dict[str, Any]] = {
    "diagonal": {},
    "diagonal-relative-mixed": {"update": "relative", "selection": "mixed"},
    "diagonal-minor": {"selection": "minor"},
    "diagonal-budget": {"rank": 6, "rank_budget": 8},
    "diagonal-embedded": {"save_bases": True},
    "diagonal-approximate": {"svd_backend": "lowrank", "svd_niter": 0, "svd_oversampling": 1, "save_bases": True},
    "core": {"method": "spectral_core"},
    "core-banded-relative-minor": {
        "method": "spectral_core",
        "core_bandwidth": 1,
        "update": "relative",
        "selection": "minor",
    },
}


def main() -> None:
    for name, options in CASES.items():
        folder = Path(__file__).parent / name
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        save_bases = options.pop("save_bases", False)
        model = get_eigentune_model(Base(), EigenTuneConfig(**{"rank": 5, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.4)
        save_adapter(model, str(folder), save_bases=save_bases)
        with torch.no_grad():
            found = load_adapter(Base(), str(folder))(inputs())
        save_file({"output": found}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
