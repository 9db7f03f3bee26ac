"""The principal subspace of one matrix: solved, cached on disk, and pinned by a small sketch, with torch and numpy."""
