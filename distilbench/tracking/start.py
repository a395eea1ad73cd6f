"""What makes a run: its start in plain text, sent at once or kept until the store is back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distilbench.identity import short_hash
from distilbench.tracking.redaction import redact
from distilbench.tracking.tags import RunStart, params_of, tags_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

log = logging.getLogger(__name__)

PARAMS_PER_BATCH = 100
LONGEST_NAME = 500
"""MLflow's own limits (mlflow.utils.validation): parameters a call, characters of a data set's name."""


@dataclass(frozen=True)
class RunContent:
    """The start of a trial as MLflow gets it, redacted; JSON holds it as it is."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    datasets: Sequence[Mapping[str, str]]
    config_yaml: str

    @classmethod
    def of(cls, start: RunStart) -> RunContent:
        """Return what is to be told of a trial that begins."""
        datasets = [_dataset(start, context, examples) for context, examples in start.datasets.items()]
        return cls(redact(start.name), tags_of(start), params_of(start.settings), datasets, redact(start.config_yaml))


def _dataset(start: RunStart, context: str, examples: int) -> dict[str, str]:
    """Return a split as MLflow's own record of an input; the digest is the split's, not the whole text's."""
    source = start.protocol.data
    kind, key = ("hugging_face", "path") if source.kind == "hub" else ("local", "uri")
    origin = {key: source.name, "revision": source.revision, "fingerprint": source.fingerprint}
    return {
        "name": redact(source.name)[:LONGEST_NAME],
        "digest": short_hash((source.fingerprint, context, examples)),
        "source_type": kind,
        "source": redact(json.dumps(origin)),
        "profile": json.dumps({"num_rows": examples}),
        "context": context,
    }


def holds(client: MlflowClient, run_id: str) -> bool:
    """Return whether there is such a run, and it was not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def claim_run(client: MlflowClient, experiment_id: str, content: RunContent, run_id: str | None) -> Run:
    """Make a run, or have the one of ``run_id`` RUNNING again; its tags tell of the process at work on it.

    A run that was deleted since is replaced, which a line tells.
    """
    from mlflow.entities import RunTag

    if run_id is not None and not holds(client, run_id):
        log.warning("run %s is no longer in the store; the trial continues as a new run", run_id)
        run_id = None
    if run_id is None:
        return client.create_run(experiment_id, tags=dict(content.tags), run_name=content.name)
    client.update_run(run_id, status="RUNNING")
    tags = {**content.tags, "distilbench.resumed": "true", "distilbench.error": ""}
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
    return client.get_run(run_id)


def fill_run(client: MlflowClient, run: Run, content: RunContent) -> None:
    """Log parameters that the run lacks (MLflow refuses to change one), data sets and configuration."""
    from mlflow.entities import Param

    run_id = run.info.run_id
    params = [Param(key, value) for key, value in content.params.items() if key not in run.data.params]
    for first in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH], synchronous=True)
    _log_datasets(client, run_id, [_input(**dataset) for dataset in content.datasets])
    client.log_text(run_id, content.config_yaml, "config.yaml")


def _log_datasets(client: MlflowClient, run_id: str, inputs: list[DatasetInput]) -> None:
    """Record the splits as inputs; MLflow looks for each and adds what it misses, as parallel trials do at once.

    Whoever is second is refused by the database, whole. The other's data set is there then, so that as many attempts
    as there are data sets, and one more, always suffice.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(len(inputs) + 1)) if inputs else ():
        try:
            client.log_inputs(run_id, datasets=inputs)
            return
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not left:
                raise


def _input(context: str, **fields: Any) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
