"""Several processes: work that one does for all, and weights that are sharded, partitioned or tensor-parallel."""
