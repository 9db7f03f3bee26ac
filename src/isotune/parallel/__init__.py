"""Several processes: work that one does for all, weights that are sharded, partitioned or tensor-parallel."""
