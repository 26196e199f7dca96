"""The run's own code on tensors of a GPU that is not there: shapes, devices and operators without contents.

What passes here meets no tensor of the wrong device, waits for the device no more often than a budget allows, and launches
no more kernels than another. Times and values are for `tests/gpu`.
"""
