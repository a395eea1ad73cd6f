# %% [markdown]
# # distilbench from Python
#
# Train one trial, several trials and a sweep; read the report as objects and as a table; use the model. Every cell
# takes seconds, since it uses a tiny model and generated sentences. Run it as a script, or open it as a notebook
# (Jupyter and VS Code read the percent format; `jupytext --to ipynb docs/quickstart.py` writes a file for Colab).
#
# **On Colab**, choose a runtime with a GPU. Then install from a checkout, in a separate cell:
#
#     !git clone <address of this repository> distilbench && cd distilbench && pip install -q -e .
#
# Colab's own torch has CUDA and is kept if its version fits. If pip replaced it by a build without CUDA:
#
#     !pip install "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cu130
#
# After installing, restart the session. On Colab, `train.precision=auto` means bf16 if the GPU supports it (a T4 trains
# in fp32), and everything in the checkout is lost when the session ends: to keep it, set `DISTILBENCH_ROOT` to a folder
# of a mounted drive before the import.

# %%
import distilbench

BASELINE = "baseline.overrides=['freeze=none','scheduler=linear','optim=adamw','optim.lr=1e-2']"
SETTINGS = ["model=tiny", "data=synthetic", "optim.lr=1e-2", "train.epochs=3", BASELINE]
# For a real model: SETTINGS = ["experiment=quick"], which takes minutes on a GPU or a CPU.

# %% [markdown]
# ## One trial, with its baseline
# The overrides are those of the command line. The returned trial has every figure and the comparison's verdict.

# %%
trial = distilbench.train_trial(*SETTINGS, "freeze.layers=1", "baseline.ensure=true")
print(trial.name, trial.result.status, f"{trial.result.report.accuracy:.2%} in {trial.result.train_seconds:.1f} s")
print("verdict:", trial.comparison.row.verdict)

# %% [markdown]
# ## Several trials at once
# On a CPU, and with `engine=fused`, trials of the same shape are trained together.

# %%
trials = distilbench.train_trials([[*SETTINGS, f"optim.lr={lr}"] for lr in ("3e-3", "1e-2")])
for each in trials:
    print(each.name, each.result.num_trials_in_batch, f"{each.result.report.accuracy:.2%}")

# %% [markdown]
# ## A sweep, and its report
# To continue the sweep, repeat the same call. With `hydra/sweeper=optuna search=accuracy`, Optuna chooses the trials.

# %%
distilbench.run_sweep(*SETTINGS, "sweep.name=quickstart", "freeze.layers=0,2")
report = distilbench.make_report("sweep=quickstart")
table = distilbench.to_table(report)
print(table[["setting", "accuracy", "difference_points", "verdict", "train_flops"]])

# %% [markdown]
# ## Predictions
# `sweep=` selects the sweep's answer, `run=` the model of a trial's run, `dir=` any Transformers directory with a
# classification head. For files of any length, use `python -m distilbench.predict`.

# %%
answers = distilbench.predict_texts(["aaa xx yz", "xx bbb", ""], "sweep=quickstart")
print(answers)
