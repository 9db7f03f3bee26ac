"""Exceptions and warnings of isotune: all are ValueErrors or UserWarnings, so callers need not import them."""

from __future__ import annotations


class IsotuneWarning(UserWarning):
    """Category of every warning that isotune itself issues, so that one filter silences or raises them all."""


class BaseMismatchError(ValueError):
    """The base model is not the one that a pinned adapter was trained on."""


class AdapterFileError(ValueError):
    """An adapter file is damaged, incomplete, or of a format that this version does not know."""


class UnsupportedVersionError(ValueError, ImportError):
    """A library that isotune depends on is too old."""
