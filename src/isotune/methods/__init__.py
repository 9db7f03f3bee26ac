"""The registry of methods: each method is one file with a configuration and an operator, and one line here."""

from isotune.methods.boft import BOFTConfig
from isotune.methods.cersa import CersaConfig
from isotune.methods.config import IsotuneConfig
from isotune.methods.goft import GOFTConfig, QGOFTConfig
from isotune.methods.hra import HRAConfig
from isotune.methods.lora_xs import LoraXsConfig
from isotune.methods.oft import OFTConfig
from isotune.methods.oplora import OploraConfig
from isotune.methods.peso import PesoConfig
from isotune.methods.psoft import PsoftConfig
from isotune.methods.road import RoadConfig
from isotune.methods.rosa import RosaConfig
from isotune.methods.svfit import SvfitConfig
from isotune.methods.uora import UoraConfig

METHODS: dict[str, type[IsotuneConfig]] = {
    "psoft": PsoftConfig,
    "oft": OFTConfig,
    "boft": BOFTConfig,
    "goft": GOFTConfig,
    "qgoft": QGOFTConfig,
    "hra": HRAConfig,
    "road": RoadConfig,
    "lora_xs": LoraXsConfig,
    "svfit": SvfitConfig,
    "cersa": CersaConfig,
    "oplora": OploraConfig,
    "rosa": RosaConfig,
    "peso": PesoConfig,
    "uora": UoraConfig,
}
"""Name of each method -> its configuration. The PEFT type is ISOTUNE_ followed by the name in capitals."""

__all__ = [
    "METHODS",
    "BOFTConfig",
    "CersaConfig",
    "GOFTConfig",
    "HRAConfig",
    "LoraXsConfig",
    "OFTConfig",
    "OploraConfig",
    "PesoConfig",
    "PsoftConfig",
    "QGOFTConfig",
    "RoadConfig",
    "RosaConfig",
    "SvfitConfig",
    "UoraConfig",
]
