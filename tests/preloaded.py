"""What the fork server of :mod:`tests.commands` imports, once for all commands: libraries, and all modules of ours.

The commands themselves, which stand at the top of the package, are left out: they are run as ``__main__``.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil

import distilbench

LIBRARIES = (
    "accelerate",
    "alembic.command",
    "datasets",
    "matplotlib.backends.backend_agg",
    "mlflow.data",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna.storages._rdb.storage",
    "optuna.storages._rdb.models",
    "rich.live",
    "sklearn.metrics",
    "sqlalchemy.dialects.sqlite",
    "torch",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.trainer",
)
ROOMS = [m.name for m in pkgutil.walk_packages(distilbench.__path__, "distilbench.") if m.name.count(".") > 1]

for name in (*LIBRARIES, *ROOMS):
    try:
        importlib.import_module(name)
    except ImportError:  # what is not installed everywhere, such as triton: whoever needs it says so
        continue
gc.freeze()  # collections in the children neither walk nor copy what is here
