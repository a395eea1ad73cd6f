# %% [markdown]
# # distilbench from Python
#
# Train one trial, a few, a sweep; read the report as objects and as a table; ask the model. Every cell takes seconds,
# since it starts from a tiny model and generated sentences. Run it as a script, or open it as a notebook (Jupyter and
# VS Code know the percent format; `jupytext --to ipynb docs/quickstart.py` makes a file for Colab).
#
# **On Colab** choose a runtime with a GPU, then, in a cell of its own, from a checkout:
#
#     !git clone <address of this repository> distilbench && cd distilbench && pip install -q -e .
#
# Colab's own torch has CUDA and is kept where its version fits. Where pip replaced it by a build without:
#
#     !pip install "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cu130
#
# After installing, restart the session. What is different there: `train.precision=auto` is bf16 where the GPU has it
# (a T4 trains in fp32), and everything under the checkout is gone with the session: set `DISTILBENCH_ROOT` to a folder
# of a mounted drive before the import to keep it.

# %%
import distilbench

BASELINE = "baseline.overrides=['freeze=none','scheduler=linear','optim=adamw','optim.lr=1e-2']"
SETTINGS = ["model=tiny", "data=synthetic", "optim.lr=1e-2", "train.epochs=3", BASELINE]
# For the real thing: SETTINGS = ["experiment=quick"], minutes on a GPU or a CPU.

# %% [markdown]
# ## One trial, with its baseline
# The same overrides as on the command line; what comes back holds every figure and what may be claimed.

# %%
trial = distilbench.train_trial(*SETTINGS, "freeze.layers=1", "baseline.ensure=true")
print(trial.name, trial.result.status, f"{trial.result.report.accuracy:.2%} in {trial.result.train_seconds:.1f} s")
print("verdict:", trial.comparison.row.verdict)

# %% [markdown]
# ## Several at once
# On a CPU, and with `engine=fused`, trials of the same shape share one model.

# %%
trials = distilbench.train_trials([[*SETTINGS, f"optim.lr={lr}"] for lr in ("3e-3", "1e-2")])
for each in trials:
    print(each.name, each.result.num_trials_in_batch, f"{each.result.report.accuracy:.2%}")

# %% [markdown]
# ## A sweep, and its report
# The same call again continues it. `hydra/sweeper=optuna search=accuracy` lets Optuna choose.

# %%
distilbench.run_sweep(*SETTINGS, "sweep.name=quickstart", "freeze.layers=0,2")
report = distilbench.make_report("sweep=quickstart")
table = distilbench.to_table(report)
print(table[["setting", "accuracy", "difference_points", "verdict", "train_flops"]])

# %% [markdown]
# ## The model, asked
# `sweep=` takes the sweep's answer, `run=` a trial's run, `dir=` any directory of Transformers with a classification
# head. Files of any length: `python -m distilbench.predict`.

# %%
answers = distilbench.predict_texts(["aaa xx yz", "xx bbb", ""], "sweep=quickstart")
print(answers)
