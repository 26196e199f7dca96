"""Published files and one's own data to raw samples: one file per format, found by itself (`registry.py`).

In: files, or folders of them (`source.open_source`). Out: a `Source` of `RawSample`s, as published and unchecked, in order; every
fault of the files in one message. `raw.py` has the shapes of what is exchanged; `docs/extending.md` adds a format.
"""
