"""Safe reading of pickles that others made: `unpickle.load_pickle` executes the opcodes in a virtual machine of its own.

In: a file or bytes. Out: numpy arrays, built-in containers, numbers and text; anything else is refused by name, and nothing
in the file is run. The room depends on numpy alone and knows nothing of the project: it can be copied out as it is.
"""
