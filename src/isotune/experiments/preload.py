"""Imports what every run needs, once, in the process of which runs are copies."""

import sklearn.metrics  # noqa: F401

import isotune.experiments.angles
import isotune.experiments.execute
import isotune.experiments.loop
import isotune.experiments.measure
import isotune.experiments.models
import isotune.experiments.tasks  # noqa: F401
