"""Imports of the fork server of :mod:`tests.commands`, once for all commands: libraries and distilbench's modules.

Excluded are modules at the top of the package, such as the commands, which run as ``__main__``, and private modules,
which import what only GPUs need.
"""

from __future__ import annotations

import gc

gc.disable()

import importlib
import pkgutil

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

import distilbench
from distilbench.data.readers import _synthetic_splits
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model
from distilbench.settings import CONF, FreezeSettings, ModelSettings, register_schema
from tests.commands import load_migrations_once, wait_for_no_disk

LIBRARIES = (
    "accelerate",
    "alembic.command",
    "alembic.config",
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "mlflow.data",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.utils.search_logged_model_utils",
    "optuna.storages._rdb.storage",
    "optuna.storages._rdb.models",
    "rich.live",
    "safetensors.numpy",
    "sklearn.metrics",
    "sqlalchemy.dialects.sqlite",
    "torch",
    "transformers.models.distilbert.modeling_distilbert",
    "transformers.trainer",
)
ROOMS = [
    module.name
    for module in pkgutil.walk_packages(distilbench.__path__, "distilbench.")
    if module.name.count(".") > 1 and "._" not in module.name
]

for name in (*LIBRARIES, *ROOMS):
    importlib.import_module(name)
load_migrations_once()
wait_for_no_disk()
registered = ConfigStore.instance().repo
own = dict(registered)
register_schema()
with initialize_config_dir(str(CONF)):  # parsers learn their grammar while they parse
    compose("config", ["model=tiny", "optim.lr=1e-4", "hydra.run.dir=here"], return_hydra_config=True)
for name in set(registered) - set(own):
    del registered[name]  # each command registers its own
_synthetic_splits(("negative", "positive"))
resolved = resolve_model(ModelSettings("random", "distilbert", layers=2))
load_tokenizer(resolved)
for layers in range(3):  # transformers compiles its table of renamed weights for the first model
    model = build_model(resolved, ("negative", "positive"), seed=0)
    freeze(model, FreezeSettings(layers, "auto", True, "depth"))
    TrainFlops.of(model)
Plugins.instance()  # Hydra looks for them, and imports them, once a process
gc.freeze()  # exclude these objects from collections, which would copy their pages in the children
gc.enable()
