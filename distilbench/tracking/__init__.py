"""Tracking of trials in MLflow: the only package that imports mlflow, and only once a store is opened.

A store creates one run per trial through ``MlflowClient`` with explicit run ids, not through MLflow's fluent API, so
that several runs can be open at once. Metrics are ``train/...`` per logging step, ``validation/...`` per evaluation
(``selection/...`` if a separate split picks epochs), and without a prefix the final ones: ``accuracy``, ``loss``,
``f1`` and ``mcc`` are the kept epoch's on the report split.
"""
