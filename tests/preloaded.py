"""Imports of the fork server of :mod:`tests.commands`, once for all commands: libraries and distilbench's modules.

Excluded are modules at the top of the package, such as the commands, which run as ``__main__``, and private modules,
which import what only GPUs need.
"""

from __future__ import annotations

import gc

gc.disable()

import importlib
import pkgutil
import tempfile
import weakref
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from matplotlib.figure import Figure

import distilbench
from distilbench.composition import baseline_config, default_treatment
from distilbench.data.readers import _synthetic_splits
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model
from distilbench.report import page
from distilbench.settings import CONF, FreezeSettings, ModelSettings, register_schema
from distilbench.sweep.storage import open_study, storage_at
from distilbench.tracking import run
from tests.commands import load_migrations_once, merge_configs_once, read_yaml_once, share_statements
from tests.made_store import add_trial, make_store

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
share_statements()
read_yaml_once()
merge_configs_once()
registered = ConfigStore.instance().repo
own = dict(registered)
register_schema()
with initialize_config_dir(str(CONF)):  # parsers learn their grammar while they parse
    baseline_config(compose("config", ["model=tiny", "optim.lr=1e-4", "hydra.run.dir=here"], return_hydra_config=True))
    default_treatment()
with tempfile.TemporaryDirectory() as folder:  # SQLAlchemy compiles statements for the first trial
    store = make_store(Path(folder))
    store.end_left_runs()
    store.search({"distilbench.seed": "42"}, [add_trial(store, parent_run_id="none")])
    study = open_study(storage_at(None, None, Path(folder)), "first", ["maximize"], None, 60)
    study.enqueue_trial({"x": 1.0}, user_attrs={"point": ""})
    trial = study.ask()
    study._storage.record_heartbeat(trial._trial_id)
    study.tell(trial, trial.suggest_float("x", 0.0, 1.0))
    study.get_trials()
for name in set(registered) - set(own):
    del registered[name]  # each command registers its own
_synthetic_splits(("negative", "positive"))
resolved = resolve_model(ModelSettings("random", "distilbert", layers=2))
load_tokenizer(resolved)
for layers in range(3):  # transformers compiles its table of renamed weights for the first model
    model = build_model(resolved, ("negative", "positive"), seed=0)
    freeze(model, FreezeSettings(layers, "auto", True, "depth"))
    TrainFlops.of(model)
run.confusion_figure = run.curve_figure = lambda *_: Figure(figsize=(1, 1))  # take a fifth of a tiny trial to draw
for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
    finalizer.atexit = False  # torch's take longer than all else at the end of a command
page.template()
Plugins.instance()  # Hydra looks for them, and imports them, once a process
gc.freeze()  # exclude these objects from collections, which would copy their pages in the children
gc.enable()
