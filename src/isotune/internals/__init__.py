"""Every place where isotune uses private parts of other libraries, as listed in docs/internals.md.

Each function says in one sentence what it uses and which public way is missing. Nothing of isotune is imported here.
"""
