"""The training worker: one process per attempt, `python -m services.trainer.worker SPEC`."""
