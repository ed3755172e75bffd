"""The two metrics of universal image embedding, under an import path that stays.

Their definition is in `modeling_udon.evaluation.metrics`.
"""

from modeling_udon.evaluation.metrics import mean_modified_precision_at_k, recall_at_k

__all__ = ["mean_modified_precision_at_k", "recall_at_k"]
