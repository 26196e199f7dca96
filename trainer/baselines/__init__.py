"""What a run has to beat: baselines of scikit-learn on a prepared dataset, fitted in seconds on a CPU, without torch.

In: a prepared dataset. Out: a folder of the form of a run's (predictions, scores, record), marked as a baseline.
"""
