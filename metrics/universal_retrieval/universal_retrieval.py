"""Retrieval metrics of universal image embedding as an `evaluate` module: R@k, mMP@k and mAP@R."""

import datasets
import evaluate

from modeling_udon.evaluation.metrics import mean_average_precision_at_r, mean_modified_precision_at_k, recall_at_k

_CITATION = """\
@inproceedings{ypsilantis2023uned,
  title={Towards Universal Image Embeddings: A Large-Scale Dataset and Challenge for Generic Image Representations},
  author={Ypsilantis, Nikolaos-Antonios and Chen, Kaifeng and Cao, Bingyi and Lipovsk{\\'y}, M{\\'a}rio and
    Dogan-Sch{\\"o}nberger, Pelin and Makosa, Grzegorz and Bluntschli, Boris and Seyedhosseini, Mojtaba and
    Chum, Ond{\\v{r}}ej and Araujo, Andr{\\'e}},
  booktitle={ICCV},
  year={2023}
}
"""

_DESCRIPTION = """\
How well queries find images of their class: recall at k, the mean modified precision at k of UnED, and the mean average
precision at R. Neighbours are rows of an index, found beforehand by any search.
"""

_INPUTS = """\
Args:
    predictions: for each query the rows of the index that were found, best first, -1 where there is none.
    references: for each query its class, or a list of classes any of which is right.
    index_labels: the class of each row of the index.
    num_positives: for each query how many rows of the index are right, the query itself left out; without it only R@k
        is computed.
    k: depths of R@k, by default 1.
    precision_k: depth of mMP@k, by default 5.
Returns:
    R@k for each k; with num_positives mMP@k, and mAP@R where as many neighbours are given as a query has positives.
Examples:
    >>> retrieval = evaluate.load("metrics/universal_retrieval")
    >>> retrieval.compute(predictions=[[1, 2], [0, 2]], references=[7, 7], index_labels=[7, 7, 3])
    {'R@1': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class UniversalRetrieval(evaluate.Metric):
    """The metrics of `modeling_udon.evaluation.metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        neighbours = datasets.Sequence(datasets.Value("int64"))
        one, several = datasets.Value("int64"), datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": neighbours, "references": one}),
                datasets.Features({"predictions": neighbours, "references": several}),
            ],
        )

    def _compute(self, predictions, references, index_labels, num_positives=None, k=(1,), precision_k=5):  # type: ignore[no-untyped-def]
        if len(set(index_labels)) < 2:
            raise ValueError(
                f"`index_labels` must hold at least two classes. Got {len(set(index_labels))}, with which every score "
                "is 100 %; search among images of other classes too."
            )
        depths = [k] if isinstance(k, int) else k
        values = {f"R@{depth}": recall_at_k(predictions, references, index_labels, depth) for depth in depths}
        if num_positives is None:
            return values
        values[f"mMP@{precision_k}"] = mean_modified_precision_at_k(
            predictions, references, index_labels, num_positives, precision_k
        )
        if max(num_positives) <= min(map(len, predictions)):
            values["mAP@R"] = mean_average_precision_at_r(predictions, references, index_labels, num_positives)
        return values
