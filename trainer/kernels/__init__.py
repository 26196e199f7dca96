"""Fused operators, each beside its plain PyTorch reference: the gate's mix, on any device and in Triton.

In: tensors of experts' values, logits and validity. Out: mixed slots and weights, with gradients.
`resolve_kernel` says which implementation runs, and why another cannot.
"""
