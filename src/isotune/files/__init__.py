"""Adapter folders and base models: reading, writing, exporting, and importing PEFT's own adapters."""
