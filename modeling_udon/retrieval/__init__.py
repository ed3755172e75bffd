"""Stable import path of the metrics: `modeling_udon.retrieval.metrics`."""
