"""Adapter folders and base models: reading, writing, exporting, and importing those of PEFT itself."""
