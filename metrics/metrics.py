"""HR@k, NDCG@k and MRR@k of ranked item lists as a Hugging Face `evaluate` module.

import evaluate                                    # run this outside the root of LC-Rec, whose evaluate.py is another
metric = evaluate.load("path/to/LC-Rec/metrics")
metric.compute(predictions=[[4, 2, 7], [1, 3, 9]], references=[2, 5], metrics="hit@1,hit@3,ndcg@3")
"""

import datasets

import evaluate

from .ranking import means, rank_of

_DESCRIPTION = "Hit rate, NDCG and MRR of ranked recommendations with one right item per sample."

_CITATION = """\
@inproceedings{zheng2024lcrec,
  title = {Adapting Large Language Models by Integrating Collaborative Semantics for Recommendation},
  author = {Zheng, Bowen and Hou, Yupeng and Lu, Hongyu and Chen, Yu and Zhao, Wayne Xin and Chen, Ming and Wen, Ji-Rong},
  booktitle = {ICDE},
  year = {2024}
}
"""

_INPUTS = """\
Args:
    predictions: for each sample the recommended item ids (int), best first.
    references: for each sample the id of the right item.
    metrics: comma list of hit@k, ndcg@k and mrr@k (default "hit@1,hit@5,hit@10,ndcg@5,ndcg@10").
Returns:
    {metric: its mean over the samples}
"""


class LCRecMetrics(evaluate.Metric):
    """See the module's docstring; the formulas are in ranking.py."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, metrics="hit@1,hit@5,hit@10,ndcg@5,ndcg@10"):
        ranks = [rank_of(target, list(items)) for target, items in zip(references, predictions, strict=True)]
        return means(ranks, metrics)
