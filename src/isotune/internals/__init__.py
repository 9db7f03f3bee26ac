"""Every place where isotune reads what another library keeps to itself, as docs/internals.md lists them.

A function here says in one sentence what it reads and which public way is missing. It imports nothing of isotune.
"""
