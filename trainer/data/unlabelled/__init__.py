"""Samples without labels, to be predicted: read one after the other and checked as preparation checks them.

In: any registered format (`inputs.py`, a line of it `lines.py`); JSON lines are streamed, so that files of any size and pipes can be read. Out: a
`CheckedSample` for each, with the sample or what is wrong with it (`reader.py`), and the dialogue before it (`history.py`).
"""
