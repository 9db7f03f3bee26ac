"""Orthogonal and principal-subspace fine-tuning for PyTorch models, hosted by Hugging Face PEFT.

Importing it registers the methods with PEFT, so that everything PEFT, transformers, TRL and diffusers do with an
adapter works with isotune's configurations.
"""

from peft import PeftModel, get_peft_model

from isotune.methods import PsoftConfig
from isotune.plugin import register

__version__ = "0.1.0"

register()

__all__ = ["PeftModel", "PsoftConfig", "__version__", "get_peft_model"]
