"""From the model's output to scores: trees of the possible answers, predictions, parsing of texts, metrics, calibration.

In: a task, a tokenizer, log-probabilities of answers or generated texts, and truths; or a file of any system's predictions.
Out: the answer tree that the model scores, predictions, and plain dictionaries of metrics. What a metric is stands in
`trainer/metric_table.py`, which tasks read too.
"""
