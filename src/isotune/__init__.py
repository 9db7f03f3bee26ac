"""Orthogonal and principal-subspace fine-tuning for PyTorch models, hosted by Hugging Face PEFT.

Importing it registers the methods with PEFT, so that PEFT, transformers, TRL and diffusers handle isotune's
configurations like any other adapter's.
"""

from isotune.versions import check_versions

check_versions()  # before anything below imports a library that may be too old

from peft import PeftModel, get_peft_model

from isotune.methods import (
    BOFTConfig,
    CersaConfig,
    GOFTConfig,
    HRAConfig,
    LoraXsConfig,
    OFTConfig,
    OploraConfig,
    PesoConfig,
    PsoftConfig,
    QGOFTConfig,
    RoadConfig,
    RosaConfig,
    SvfitConfig,
    UoraConfig,
)
from isotune.tools.decoding import evaluated_once
from isotune.tools.hotswap import hotswap_adapter
from isotune.tools.ranks import choose_ranks
from isotune.tools.regularization import regularization_callback, regularization_loss
from isotune.tools.several import add_adapter, load_adapter
from isotune.tools.truncation import truncation_error
from isotune.tuner.register import register

__version__ = "0.1.0"

register()

__all__ = [
    "BOFTConfig",
    "CersaConfig",
    "GOFTConfig",
    "HRAConfig",
    "LoraXsConfig",
    "OFTConfig",
    "OploraConfig",
    "PeftModel",
    "PesoConfig",
    "PsoftConfig",
    "QGOFTConfig",
    "RoadConfig",
    "RosaConfig",
    "SvfitConfig",
    "UoraConfig",
    "__version__",
    "add_adapter",
    "choose_ranks",
    "evaluated_once",
    "get_peft_model",
    "hotswap_adapter",
    "load_adapter",
    "regularization_callback",
    "regularization_loss",
    "truncation_error",
]
