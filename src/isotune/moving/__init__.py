"""Subspaces that move during training: at each boundary an adapter folds what it has learnt into an accumulated update
and goes on in another subspace of the current weight."""

from isotune.moving.boundary import Move
from isotune.moving.reinitialising import Reinitialization, UoraSchedule
from isotune.moving.schedule import MovingSchedule

__all__ = ["Move", "MovingSchedule", "Reinitialization", "UoraSchedule"]
