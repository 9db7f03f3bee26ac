"""What isotune raises and warns with; everything is a ValueError or a UserWarning, so callers need not import it."""

from __future__ import annotations


class IsotuneWarning(UserWarning):
    """The category of every warning that isotune itself gives, so that one filter silences or raises them."""


class BaseMismatchError(ValueError):
    """The base model is not the one that a pinned adapter was trained on."""


class AdapterFileError(ValueError):
    """An adapter file is damaged, incomplete, or of a format that this version does not know."""


class UnsupportedVersionError(ValueError, ImportError):
    """A library that isotune stands on is too old."""
